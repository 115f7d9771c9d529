r"""What a fast round says about itself, from small cores and a few random probes.

Norms, captures and votes come from the Gram cores. What would need all Σr² inner products of the devices (‖M‖, the
cosines to the mean) is estimated with k = 16 Gaussian probes Ω (n×k) from one fixed seed: ⟨X, Y⟩ ≈ ⟨XΩ, YΩ⟩/k, with a
relative spread of about √(2/(k·rank)) of a norm, and ‖M‖² = ‖S'‖² + ‖(I − P)M‖², of which only the second term is
estimated: a round that loses nothing shows exactly that. The probes see products only, so nothing depends on a gauge.
A_iΩ comes with the Gram cores, and the rest rides along with passes that the round makes anyway.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from glora_server.aggregation.diagnostics import (
    ClientDiagnostics,
    Diagnostics,
    coverage,
    eigengap,
    influence,
    principal_angles,
)
from glora_server.aggregation.fast.intake import Group, ModuleRound, VoteRule
from glora_server.aggregation.fast.operator import shared_tails
from glora_server.aggregation.fast.probes import PROBES, probes
from glora_server.aggregation.rules import Rule
from glora_server.aggregation.state import LayerState

ROUNDING = 3e-6
"""What is lost, relative to what is held, below which nothing is: float32 rounding of the probes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """Σp_iΔW_iΩ, Σp_iD_iΩ, M·Ω (M×d×k), and η·sent·Ω of each group; `changes` is `updates` under replace."""

    updates: Tensor
    changes: Tensor
    mean: Tensor
    sent: tuple[Tensor, ...]

    @property
    def distinct(self) -> list[Tensor]:
        """Updates and changes, once where they are one."""
        return [self.updates] if self.changes is self.updates else [self.updates, self.changes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Folded:
    """UᵀM (M×R×n), and per group the UᵀB_i (M×m×R×r) and [Σp ΔWΩ, Σp DΩ]ᵀB_i (M×m×2k×r, or k where the two are one)."""

    inside: Tensor
    projected: tuple[Tensor, ...]
    probed: tuple[Tensor, ...]


def images(groups: Sequence[Group], rule: VoteRule, raw: Tensor) -> Images:
    """The probed means; `raw` = Σp_if_iB_iA_iΩ."""
    wide = probes(groups[0].devices.shape, raw.device)
    tails, sents, sent = torch.zeros_like(raw), torch.zeros_like(raw), []
    for group, tail in zip(groups, shared_tails(groups), strict=True):
        tails += tail.times(wide)
        held = group.tail.sent_b.float() @ (group.tail.sent_a.float() @ wide) * group.tail.sent_gain[:, None, None]
        sent.append(held.float())
        sents += sent[-1] * group.batch.share.sum(dim=1).float()[:, None, None]
    updates = raw / rule.step
    # Under replace the change is the update; else D = ηΔW − η·sent, and X = T + ηΔW.
    changes = updates if rule.rule is Rule.REPLACE else raw - sents
    return Images(updates=updates, changes=changes, mean=raw + tails, sent=tuple(sent))


def fold(groups: Sequence[Group], basis: Tensor, probed: Images) -> Folded:
    """The last pass over all factors: UᵀM, and what the diagnostics need of it."""
    rows = torch.cat([basis, *probed.distinct], dim=2).mT.contiguous()
    inside, k = basis.new_zeros(()), basis.shape[2]
    projected, others = [], []
    for group, tail in zip(groups, shared_tails(groups), strict=True):
        onto = group.devices.onto(rows)
        inside = inside + tail.onto(rows[:, :k]) + group.devices.right_sum(onto[:, :, :k] * group.weights.float())
        projected.append(onto[:, :, :k])
        others.append(onto[:, :, k:])
    return Folded(inside=inside, projected=tuple(projected), probed=tuple(others))


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A round of some modules, from which each one's diagnostics are taken."""

    groups: tuple[Group, ...]
    spectrum: Tensor
    basis: Tensor
    images: Images
    folded: Folded

    def diagnostics(
        self, modules: Sequence[ModuleRound], states: Sequence[LayerState], *, rank: int
    ) -> list[Diagnostics]:
        """The record of `diagnostics.Diagnostics` for each module, with the estimates named above."""
        inside = torch.linalg.matrix_norm(self.folded.inside.double()).tolist()
        found = []
        for position, (module, new) in enumerate(zip(modules, states, strict=True)):
            held, lost = inside[position], self.lost[position]
            lost = 0.0 if lost <= ROUNDING * held else lost
            found.append(self._record(position, module, new, inside=held, outside=lost, rank=rank))
        return found

    def _record(
        self, position: int, module: ModuleRound, new: LayerState, *, inside: float, outside: float, rank: int
    ) -> Diagnostics:
        spectrum, mean_norm = self.spectrum[position].tolist(), math.hypot(inside, outside)
        return Diagnostics(
            eigenvalues=tuple(spectrum[:rank]),
            eigengap=eigengap(spectrum, int((self.basis[position].square().sum(dim=0) > 0).sum())),
            sigma=tuple(new.sigma.tolist()),
            mean_norm=mean_norm,
            captured_energy=(inside / mean_norm) ** 2 if mean_norm else 1.0,
            truncation_error=outside / mean_norm if mean_norm else 0.0,
            aggregation_bias=0.0,
            coverage=coverage(module.updates, module.weights, rank),
            clients=self.clients[position],
            angles=principal_angles(module.state, new),
        )

    @cached_property
    def lost(self) -> list[float]:
        """‖(I − P)M‖_F of each module, estimated."""
        rest = self.images.mean - self.basis @ (self.basis.mT @ self.images.mean)
        norms: list[float] = (torch.linalg.matrix_norm(rest.double()) / math.sqrt(PROBES)).tolist()
        return norms

    @cached_property
    def mean_changes(self) -> list[float]:
        """‖Σp_iD_i‖_F of each module, estimated."""
        norms: list[float] = (torch.linalg.matrix_norm(self.images.changes.double()) / math.sqrt(PROBES)).tolist()
        return norms

    @cached_property
    def clients(self) -> list[tuple[ClientDiagnostics, ...]]:
        """One record per device, for each module, in the order of the updates."""
        by_group = [_clients(group, self, position) for position, group in enumerate(self.groups)]
        found = []
        for module in range(len(by_group[0])):
            records = {
                client: record
                for group, of_modules in zip(self.groups, by_group, strict=True)
                for client, record in zip(group.clients, of_modules[module], strict=True)
            }
            found.append(tuple(records[i] for i in range(len(records))))
        return found


def _clients(group: Group, survey: Survey, position: int) -> list[list[ClientDiagnostics]]:
    onto = survey.folded.projected[position].double()
    products = (group.gram_b * group.gram_a).sum(dim=(-2, -1)).clamp(min=0)
    caught = ((onto.mT @ onto) * group.gram_a).sum(dim=(-2, -1)).clamp(min=0)
    capture = torch.where(products > 0, (caught / products).sqrt().clamp(max=1.0), 1.0)
    cosines, change_cosines = _cosines(group, survey, position)
    columns = (group.batch.share, group.votes, group.norms, group.changes, cosines, change_cosines, capture)
    return [
        [
            ClientDiagnostics(
                rank=group.rank,
                share=share,
                votes=votes,
                update_norm=norm,
                change_norm=change,
                cosine=cosine if norm else 0.0,
                change_cosine=change_cosine if change else 0.0,
                capture=held,
                influence=influence(share, change, change_cosine, mean_change),
            )
            for share, votes, norm, change, cosine, change_cosine, held in zip(*rows, strict=True)
        ]
        for mean_change, *rows in zip(survey.mean_changes, *(column.tolist() for column in columns), strict=True)
    ]


def _cosines(group: Group, survey: Survey, position: int) -> tuple[Tensor, Tensor]:
    """Of ΔW_i to their mean and of D_i to theirs (M×m), between the probed images."""
    seen, sent = group.probed.double(), survey.images.sent[position].double()
    probed, gain, k = survey.folded.probed[position].double().mT, group.batch.gain, PROBES
    changes = survey.images.changes.double()
    to_updates = (seen * probed[..., :k]).sum(dim=(-2, -1))
    own = (seen * (group.gram_b @ seen)).sum(dim=(-2, -1)).clamp(min=0)
    of_sent = (sent * changes).sum(dim=(-2, -1))[:, None]
    to_changes = gain * (seen * probed[..., -k:]).sum(dim=(-2, -1)) - of_sent
    # ⟨B_iA_iΩ, η·B0A0Ω⟩ from B_iᵀB0.
    sent_seen = (group.tail.sent_a.double() @ probes(group.devices.shape, sent.device).double())[:, None]
    with_sent = (seen * (group.gram_sent.mT @ sent_seen)).sum(dim=(-2, -1)) * group.tail.sent_gain[:, None]
    squares = sent.square().sum(dim=(-2, -1))[:, None]
    changed = (own * gain.square() + squares - 2 * gain * with_sent).clamp(min=0)
    updates_norm = torch.linalg.matrix_norm(survey.images.updates.double())[:, None]
    return (
        _quotient(to_updates, own.sqrt() * updates_norm),
        _quotient(to_changes, changed.sqrt() * torch.linalg.matrix_norm(changes)[:, None]),
    )


def _quotient(inner: Tensor, norms: Tensor) -> Tensor:
    tiny = torch.finfo(norms.dtype).tiny
    return torch.where(norms > 0, inner / norms.clamp(min=tiny), 0.0).clamp(-1.0, 1.0)
