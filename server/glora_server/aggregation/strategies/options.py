"""Options that a strategy declares: names, defaults, limits; and the check of what a run gives."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from glora_server.aggregation.errors import OptionError

OptionValue = str | float | int | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceOption:
    """One of some words."""

    name: str
    summary: str
    default: str
    choices: tuple[str, ...]

    def check(self, value: OptionValue) -> str:
        """The value, if it is one of the choices; raises OptionError."""
        if not isinstance(value, str) or value not in self.choices:
            raise OptionError(f"Option {self.name!r} is {value!r}; use one of {', '.join(self.choices)}.")
        return str(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberOption:
    """A number above `above` and at most `at_most`, whole if `whole`; a default of None: the strategy chooses."""

    name: str
    summary: str
    default: float | None
    above: float = 0.0
    at_most: float = math.inf
    whole: bool = False

    def check(self, value: OptionValue) -> float | None:
        """The value, if it is in range; raises OptionError."""
        if value is None and self.default is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.above < value <= self.at_most:
            limit = f" and at most {self.at_most:g}" if math.isfinite(self.at_most) else ""
            raise OptionError(f"Option {self.name!r} is {value!r}; use a number above {self.above:g}{limit}.")
        if not math.isfinite(value):
            raise OptionError(f"Option {self.name!r} must be finite.")
        if self.whole and value != int(value):
            raise OptionError(f"Option {self.name!r} is {value!r}; use a whole number.")
        return float(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksOption:
    """Rising ranks, written "4, 8, 16"; None means that the strategy chooses."""

    name: str
    summary: str
    default: str | None = None

    def check(self, value: OptionValue) -> str | None:
        """The value in its shortest spelling, if it is a list of rising ranks; raises OptionError."""
        if value is None and self.default is None:
            return None
        parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else []
        ranks = [int(part) for part in parts if part.isascii() and part.isdigit()]
        if not parts or len(ranks) != len(parts) or ranks[0] < 1 or sorted(set(ranks)) != ranks:
            raise OptionError(f'Option {self.name!r} is {value!r}; write rising ranks with commas, such as "4, 8, 16".')
        return ",".join(map(str, ranks))


Option = ChoiceOption | NumberOption | RanksOption


def resolve_options(
    strategy: str, declared: Sequence[Option], given: Mapping[str, OptionValue]
) -> Mapping[str, OptionValue]:
    """Every declared option with its checked value or its default. Raises OptionError for unknown names."""
    names = [option.name for option in declared]
    unknown = sorted(set(given) - set(names))
    if unknown:
        allowed = f"it knows {', '.join(names)}" if names else "it has no options"
        raise OptionError(f"The strategy {strategy!r} has no option {', '.join(map(repr, unknown))}; {allowed}.")
    return {
        option.name: option.check(given[option.name]) if option.name in given else option.default for option in declared
    }


def number(options: Mapping[str, OptionValue], name: str) -> float:
    """A resolved number that has a default. Raises OptionError when it is not a number."""
    value = optional_number(options, name)
    if value is None:
        raise OptionError(f"Option {name!r} has no value.")
    return value


def optional_number(options: Mapping[str, OptionValue], name: str) -> float | None:
    """A resolved number, or None where the strategy chooses."""
    value = options[name]
    if value is None:
        return None
    if isinstance(value, str | bool):
        raise OptionError(f"Option {name!r} is {value!r}; use a number.")
    return float(value)
