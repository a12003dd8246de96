"""A training state in our names, between the files of other projects and live modules."""

import copy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from densecl_ops import _checks, _tracing
from densecl_ops.head import DenseProjectionHead
from densecl_ops.interop.names import ALL_PARTS, plain_names, strip_wrappers, without_wrappers
from densecl_ops.queue import MomentumQueue

State = dict[str, Tensor]


def raise_all(subject: str, problems: list[str]) -> None:
    """One error that lists everything found, so that nobody repairs a checkpoint entry by entry."""
    if problems:
        raise ValueError(f"{subject}: got {len(problems)} mismatches, expected none\n  " + "\n  ".join(problems))


@dataclass(eq=False)
class Checkpoint:
    """Backbones, heads and queues of a training run as plain state dicts in our names.

    Attributes:
        format: Where it came from: "densecl", "mmpretrain", "moco", "lightly", "backbone", or "densecl_ops" for live
            modules.
        backbone_q, backbone_k: Query and key (momentum) backbone in their own names, without classifier; as every
            part, None where the source has none.
        head_q, head_k: For DenseProjectionHead.load_state_dict. MoCo's have image_mlp entries only.
        image_queue, dense_queue: For MomentumQueue.load_state_dict: rows (K, D), position () and count () int64.
        extra: What the file holds beside the model: epoch, meta, optimizer, ...
        unmapped: Entries of the model that have no place in our modules, such as a classifier, under their full names.
        prefix: What stood before all names, such as "module."; for "backbone", before those of the backbone.
        key: Under which key of the source the model stood. None: the source was the state dict itself.

    Example:
        >>> from densecl_ops import DenseProjectionHead, MomentumQueue
        >>> from densecl_ops.interop import Checkpoint
        >>> head, queue = DenseProjectionHead(8, 8, 4), MomentumQueue(16, 4)
        >>> checkpoint = Checkpoint.from_modules(head_q=head, image_queue=queue)
        >>> checkpoint
        Checkpoint(format='densecl_ops', head_q=8 entries, image_queue=3 entries)
        >>> checkpoint.load_into(head_q=DenseProjectionHead(8, 8, 4))
        []
    """

    format: str = "densecl_ops"
    backbone_q: State | None = None
    backbone_k: State | None = None
    head_q: State | None = None
    head_k: State | None = None
    image_queue: State | None = None
    dense_queue: State | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    unmapped: State = field(default_factory=dict)
    prefix: str = ""
    key: str | None = "state_dict"

    @classmethod
    def from_modules(
        cls,
        *,
        backbone_q: nn.Module | None = None,
        backbone_k: nn.Module | None = None,
        head_q: DenseProjectionHead | None = None,
        head_k: DenseProjectionHead | None = None,
        image_queue: MomentumQueue | None = None,
        dense_queue: MomentumQueue | None = None,
        extra: dict[str, Any] | None = None,
    ) -> "Checkpoint":
        """Copies the state of live modules.

        What torch.compile, DataParallel, DistributedDataParallel, AveragedModel, activation checkpointing and FSDP put
        into names, around a module or inside it, is taken out. The children of a ResNet that nn.Sequential gave
        numbers get their names. Shards of FSDP2 are gathered: there every rank must call it.

        Args:
            backbone_q, backbone_k, head_q, head_k, image_queue, dense_queue: The modules of these parts; backbones
                without classifier.
            extra: Kept as it is and written beside the model, for example {"meta": {"epoch": 3, "iter": 900}}.

        Raises:
            TypeError: An argument is neither None nor a torch.nn.Module.
        """
        modules = _given(backbone_q, backbone_k, head_q, head_k, image_queue, dense_queue)
        checkpoint = cls(extra=dict(extra or {}))
        for part, module in modules.items():
            state = {name: value.detach() for name, (_, value) in _plain_state(module).items()}
            whole = {name: x.full_tensor() if _tracing.is_sharded(x) else x for name, x in state.items()}  # type: ignore
            setattr(checkpoint, part, {name: x.clone() for name, x in whole.items()})
        return checkpoint

    def load_into(
        self,
        *,
        backbone_q: nn.Module | None = None,
        backbone_k: nn.Module | None = None,
        head_q: DenseProjectionHead | None = None,
        head_k: DenseProjectionHead | None = None,
        image_queue: MomentumQueue | None = None,
        dense_queue: MomentumQueue | None = None,
        keep_dense: bool = False,
    ) -> list[str]:
        """Loads the parts whose modules are given, strictly, and either all or none: it holds a copy meanwhile.

        Modules may be wrapped, as in `from_modules`. An AveragedModel that averaged nothing yet counts what it is
        given as its first model: else the next update would overwrite it.

        Args:
            backbone_q, backbone_k, head_q, head_k, image_queue, dense_queue: The modules of these parts.
            keep_dense: Whether the dense branch of a head stays as it is where the checkpoint has none (MoCo's).
                Default False: an error.

        Returns:
            The entries that keep_dense left as they were, such as "head_q.dense_mlp.0.weight".

        Raises:
            TypeError: An argument is neither None nor a torch.nn.Module.
            ValueError: No module is given; a part or an entry is missing, unexpected or of another shape; or a module
                refuses what it is given, as a queue a position of another one's rows.
        """
        _checks.require_bool("keep_dense", keep_dense)
        modules = _given(backbone_q, backbone_k, head_q, head_k, image_queue, dense_queue)
        if not modules:
            raise ValueError("load_into: got no module, expected at least one")
        problems: list[str] = []
        kept: list[str] = []
        for part, module in modules.items():
            state: State | None = getattr(self, part)
            if state is None:
                problems.append(f"{part}: got a checkpoint ({self.format}) without it, expected one that has it")
                continue
            no_dense = part.startswith("head") and not any(name.startswith("dense_mlp.") for name in state)
            wanted = {name: value for name, (_, value) in _plain_state(module).items()}
            if any(value.is_meta for value in wanted.values()):  # torch would warn, and load nothing
                problems.append(f"{part}: got a module on meta, expected one with values: .to_empty(device=...) first")
            for name in dict.fromkeys([*wanted, *state]):
                missing_dense = no_dense and name.startswith("dense_mlp.")
                got, due = (_checks.shape_of(x[name]) if name in x else None for x in (state, wanted))
                if missing_dense and keep_dense:
                    kept.append(f"{part}.{name}")
                elif got is None:
                    hint = " (keep_dense=True leaves it as it is)" if missing_dense else ""
                    problems.append(f"{part}.{name}: got nothing, expected shape {due}{hint}")
                elif got != due:
                    problems.append(f"{part}.{name}: got shape {got}, expected {due or 'no such entry'}")
        raise_all("checkpoint", problems)
        before = {part: copy.deepcopy(module.state_dict()) for part, module in modules.items()}
        try:
            for part, module in modules.items():
                _load(module, getattr(self, part))
        except Exception as error:
            for other, own in before.items():
                modules[other].load_state_dict(own)
            raise ValueError(f"{part}: got entries that the module refuses, so no part is loaded: {error}") from error
        return kept

    def __repr__(self) -> str:
        shown = [f"format={self.format!r}"] + [f"prefix={self.prefix!r}"] * bool(self.prefix)
        shown += [f"{part}={len(state)} entries" for part in ALL_PARTS if (state := getattr(self, part)) is not None]
        if self.unmapped:
            before = strip_wrappers(self.unmapped)
            roots = dict.fromkeys(name.removeprefix(before).partition(".")[0] for name in self.unmapped)
            shown.append(f"unmapped={len(self.unmapped)} entries ({', '.join(roots)})")
        shown += [f"extra={sorted(map(str, self.extra))}"] * bool(self.extra)
        return f"Checkpoint({', '.join(shown)})"


def _given(*modules: nn.Module | None) -> dict[str, nn.Module]:
    """The modules that are not None, by part."""
    given = {part: module for part, module in zip(ALL_PARTS, modules, strict=True) if module is not None}
    for part, module in given.items():
        if not isinstance(module, nn.Module):
            raise TypeError(f"{part}: got {type(module).__name__}, expected a torch.nn.Module")
    return given


def _load(module: nn.Module, state: State) -> None:
    own = module.state_dict()
    for plain, (name, value) in _plain_state(module).items():
        if plain in state and _tracing.is_sharded(value):
            from torch.distributed.tensor import distribute_tensor

            own[name] = distribute_tensor(state[plain].to(value.device), value.device_mesh, value.placements)  # type: ignore[attr-defined]
        elif plain in state:
            own[name] = state[plain]
    module.load_state_dict(own)
    for inner in module.modules():
        if isinstance(inner, AveragedModel):
            inner.n_averaged.clamp_(min=1)


def _plain_state(module: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Name without wrappers -> name in the module's own state dict, and value."""
    wrappers = (DataParallel, DistributedDataParallel, AveragedModel)
    inner_last = [path for path, inner in module.named_modules(remove_duplicate=False) if isinstance(inner, wrappers)]
    places = [f"{path}." if path else "" for path in map(without_wrappers, inner_last)]
    state: dict[str, tuple[str, Tensor]] = {}
    for name, value in module.state_dict().items():
        plain = without_wrappers(name)
        if any(plain == f"{place}n_averaged" for place in places):
            continue  # AveragedModel's own
        for place in reversed(places):
            if plain.startswith(f"{place}module."):
                plain = place + plain.removeprefix(f"{place}module.")
        state[plain] = name, value
    named = plain_names(state)
    return {named[plain]: entry for plain, entry in state.items()}
