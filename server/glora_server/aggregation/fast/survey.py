r"""What a fast round says about itself, from small cores and a few random probes.

Norms, captures and votes come from the Gram cores. What would need all Σr² inner products of the devices (‖M‖, the
cosines to the mean) is estimated with k = 16 Gaussian probes Ω (n×k) from one fixed seed: ⟨X, Y⟩ ≈ ⟨XΩ, YΩ⟩/k, with a
relative spread of about √(2/(k·rank)) of a norm, and ‖M‖² = ‖S'‖² + ‖(I − P)M‖², of which only the second term is
estimated: a round that loses nothing shows exactly that. The probes see products only, so nothing depends on a gauge.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glora_server.aggregation.diagnostics import ClientDiagnostics, Diagnostics, coverage, principal_angles
from glora_server.aggregation.factors import ClientUpdate
from glora_server.aggregation.fast.intake import Group, VoteRule
from glora_server.aggregation.fast.operator import shared_tails
from glora_server.aggregation.fast.span import Span
from glora_server.aggregation.rules import Rule
from glora_server.aggregation.state import LayerState

_PROBES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """Ω (n×k) and its images: Σp_iΔW_iΩ, Σp_iD_iΩ, M·Ω (d×k), and A_iΩ (r×k) of each device, group by group."""

    updates: Tensor
    changes: Tensor
    mean: Tensor
    seen: tuple[tuple[Tensor, ...], ...]
    sent: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Folded:
    """UᵀM (R×n), and per group the UᵀB_i (m×R×r) and B_iᵀ[Σp ΔWΩ, Σp DΩ] (m×r×2k, or k where the two are one)."""

    inside: Tensor
    projected: tuple[Tensor, ...]
    probed: tuple[Tensor, ...]


def probe(groups: Sequence[Group], rule: VoteRule) -> Probes:
    """One pass over all factors with k columns."""
    like = groups[0].batch.a[0]
    generator = torch.Generator().manual_seed(1)
    omega = torch.randn((like.shape[1], _PROBES), generator=generator).to(like.device)
    raw = omega.new_zeros((groups[0].batch.b[0].shape[0], _PROBES))
    tails, sents, seen, sent = torch.zeros_like(raw), torch.zeros_like(raw), [], []
    for group, tail in zip(groups, shared_tails(groups), strict=True):
        own = tuple(a.float() @ omega for a in group.batch.a)
        for b, part, weight in zip(group.batch.b, own, group.weights, strict=True):
            raw.addmm_(b.float(), part, alpha=weight)
        tails += tail.times(omega)
        held = group.tail.sent_b.float() @ (group.tail.sent_a.float() @ omega) * group.tail.sent_gain
        sents += held * float(group.batch.share.sum())
        seen.append(own)
        sent.append(held)
    mean_update = raw / rule.step
    # Under replace the change is the update; else D = ηΔW − η·sent, and X = T + ηΔW.
    return Probes(
        updates=mean_update,
        changes=mean_update if rule.rule is Rule.REPLACE else raw - sents,
        mean=raw + tails,
        seen=tuple(seen),
        sent=tuple(sent),
    )


def fold(groups: Sequence[Group], basis: Tensor, probes: Probes) -> Folded:
    """The last pass over all factors: UᵀM, and what the diagnostics need of it."""
    narrow = basis.float()
    probed_by = [probes.updates] if probes.changes is probes.updates else [probes.updates, probes.changes]
    wide = torch.cat([narrow, *probed_by], dim=1).mT.contiguous()
    inside = narrow.new_zeros((narrow.shape[1], groups[0].batch.a[0].shape[1]))
    m, projected, probed = narrow.shape[1], [], []
    for group, tail in zip(groups, shared_tails(groups), strict=True):
        inside += tail.left_times(narrow)
        onto = torch.stack([wide @ b.float() for b in group.batch.b])
        for part, a, weight in zip(onto[:, :m], group.batch.a, group.weights, strict=True):
            inside.addmm_(part, a.float(), alpha=weight)
        projected.append(onto[:, :m])
        probed.append(onto[:, m:].mT)
    return Folded(inside=inside, projected=tuple(projected), probed=tuple(probed))


def diagnostics(
    groups: Sequence[Group],
    updates: Sequence[ClientUpdate],
    weights: Sequence[float],
    *,
    span: Span,
    probes: Probes,
    folded: Folded,
    previous: LayerState | None,
    new: LayerState,
    rank: int,
) -> Diagnostics:
    """The record of `diagnostics.Diagnostics`, with the estimates named above."""
    basis = span.basis.float()
    inside = float(torch.linalg.matrix_norm(folded.inside.double()))
    rest = probes.mean - basis @ (basis.mT @ probes.mean)
    outside = float(torch.linalg.matrix_norm(rest.double())) / math.sqrt(_PROBES)
    if outside <= 1e-6 * inside:  # float32 rounding of the probes
        outside = 0.0
    mean_norm = math.hypot(inside, outside)
    spectrum = [*span.spectrum[: rank + 1].tolist(), 0.0, 0.0]
    records = {
        client: record
        for position, group in enumerate(groups)
        for client, record in zip(group.clients, _clients(group, probes, folded, position), strict=True)
    }
    return Diagnostics(
        eigenvalues=tuple(span.spectrum[:rank].tolist()),
        eigengap=spectrum[rank - 1] - spectrum[rank] if rank <= span.spectrum.numel() else 0.0,
        sigma=tuple(new.sigma.tolist()),
        mean_norm=mean_norm,
        captured_energy=(inside / mean_norm) ** 2 if mean_norm else 1.0,
        truncation_error=outside / mean_norm if mean_norm else 0.0,
        coverage=coverage(updates, weights, rank),
        clients=tuple(records[i] for i in range(len(updates))),
        angles=principal_angles(previous, new),
    )


def _clients(group: Group, probes: Probes, folded: Folded, position: int) -> list[ClientDiagnostics]:
    onto = folded.projected[position].double()
    products = (group.gram_b * group.gram_a).sum(dim=(1, 2)).clamp(min=0)
    caught = ((onto.mT @ onto) * group.gram_a).sum(dim=(1, 2)).clamp(min=0)
    capture = torch.where(products > 0, (caught / products).sqrt().clamp(max=1.0), 1.0)
    cosines, change_cosines = _cosines(group, probes, folded.probed[position], position)
    return [
        ClientDiagnostics(
            rank=group.rank,
            share=share,
            votes=votes,
            update_norm=norm,
            change_norm=change,
            cosine=cosine if norm else 0.0,
            change_cosine=change_cosine if change else 0.0,
            capture=held,
        )
        for share, votes, norm, change, cosine, change_cosine, held in zip(
            group.batch.share.tolist(), group.votes, group.norms.tolist(), group.changes.tolist(),
            cosines, change_cosines, capture.tolist(), strict=True,
        )
    ]  # fmt: skip


def _cosines(group: Group, probes: Probes, probed: Tensor, position: int) -> tuple[list[float], list[float]]:
    """Of ΔW_i to their mean and of D_i to theirs, between the probed images."""
    seen = torch.stack(probes.seen[position]).double()
    sent, k = probes.sent[position].double(), _PROBES
    to_updates = (seen * probed[..., :k].double()).sum(dim=(1, 2))
    own = (seen * (group.gram_b @ seen)).sum(dim=(1, 2)).clamp(min=0)
    to_changes = group.batch.gain * (seen * probed[..., -k:].double()).sum(dim=(1, 2)) - (sent * probes.changes).sum()
    changed = own * group.batch.gain.square()
    if bool(sent.any()):
        with_sent = torch.stack([(b.double() @ s * sent).sum() for b, s in zip(group.batch.b, seen, strict=True)])
        changed = (changed + sent.square().sum() - 2 * group.batch.gain * with_sent).clamp(min=0)
    return (
        _quotient(to_updates, own.sqrt() * torch.linalg.matrix_norm(probes.updates.double())),
        _quotient(to_changes, changed.sqrt() * torch.linalg.matrix_norm(probes.changes.double())),
    )


def _quotient(inner: Tensor, norms: Tensor) -> list[float]:
    tiny = torch.finfo(norms.dtype).tiny
    values: list[float] = torch.where(norms > 0, inner / norms.clamp(min=tiny), 0.0).clamp(-1.0, 1.0).tolist()
    return values
