"""`AdapterBank`: many AdaMSS adapters over one base model, any of them for each row of a batch."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_file import TENSORS_FILE, read_checkpoint, write_layers
from .bank_linear import BankHead, BankLinear, bank_layer
from .checkpoint import SAME_UPDATE, SIMILAR_UPDATE, BaseWeightWarning, KnownBase, build_layers
from .config import AdaMSSConfig, require_config
from .decompose import augmented
from .linear import FusedAdaMSSLinear
from .mixed_batch import MixedBatch, under_way
from .model import adapted_layers, swap
from .offload import is_offloaded
from .over_base import adapt
from .sketch import sketch_linear
from .targets import modules_named, target_linears

logger = logging.getLogger(__name__)

_numbers = itertools.count()


class AdapterBank:
    """Many AdaMSS adapters over one base model, of which each row of a batch takes its own, or none.

    The adapters share the frozen basis and row map of each layer; B, C and masks are each adapter's own, and so are
    modules that were trained whole (`modules_to_save`), which have to be linear. To serve:

        bank = AdapterBank(model, {"ann": "adapters/ann", "bob": "adapters/bob"})
        with bank.select(["ann", "bob", None]), torch.no_grad():
            y = model(x)  # of three rows

    To train, each adapter with an optimizer of its own or all with one: the gradients of each are those that its own
    rows alone would give, and an adapter without rows gets none (zeros where the layers are compiled).

        bank.add("high", config), bank.add("low", config)
        optimizers = [AdamW(bank.parameters("high"), lr=1e-2), AdamW(bank.parameters("low"), lr=1e-3)]

    The base model's parameters are frozen. Its state dict stays the base model's; `save` writes adapters. Outside of
    `select` the model computes what the base model alone does.

    Attributes:
        model: The base model, changed in place.
    """

    def __init__(
        self, model: nn.Module, adapters: Mapping[str, str | os.PathLike[str]] | None = None, *, strict: bool = True
    ) -> None:
        """Take a base model, and load adapters onto it.

        Args:
            model: Without adapters; its layers are replaced in place when the first adapter comes.
            adapters: Directories that `save_adapter` wrote, by the name that each adapter gets.
            strict: As in `load`.

        Raises:
            ValueError: `model` has adapted layers already, or as `load`; then the model is left as it was.
        """
        taken = [*adapted_layers(model), *(n for n, m in model.named_modules() if isinstance(m, BankLinear))]
        if taken:
            raise ValueError(f"model: {taken[0]!r} is adapted already; an AdapterBank takes the base model")
        self.model = model
        self._number = next(_numbers)
        self._layers: dict[str, BankLinear] = {}
        self._heads: dict[str, BankHead] = {}
        self._config: AdaMSSConfig | None = None
        self._slots: dict[str, int] = {}
        self._in_use: Counter[str] = Counter()
        self._lock = threading.RLock()
        known: dict[str, KnownBase] = {}
        try:
            for name, directory in (adapters or {}).items():
                self._load(name, directory, strict, known)
                known = known or self._known()
        except BaseException:
            self._give_back()
            raise

    @property
    def names(self) -> list[str]:
        """The adapters, in the order in which they came."""
        return list(self._slots)

    def load(self, name: str, directory: str | os.PathLike[str], *, strict: bool = True) -> None:
        """Load an adapter that `save_adapter` or `save` wrote.

        The first one brings the basis and row map that all share. A later one's basis may differ as by rounding (it was
        trained with other threads, on another machine or on a rounded copy of the base): then B is solved for anew, so
        that B A is the trained one, and level INFO of the log says how nearly.

        Args:
            name: What the adapter is called here.
            directory: Where it was saved.
            strict: As in `load_adapter`.

        Raises:
            FileNotFoundError: There is no checkpoint in `directory`.
            ValueError: The name is taken; the file is damaged, of another method or of another base; or the adapter
                has another config, row map or basis than the bank's. The message names adapter and layer; nothing is
                changed.

        Warns:
            BaseWeightWarning: As `load_adapter`; or the update on the bank's basis is off by more than rounding.
        """
        self._load(name, directory, strict, self._known())

    def _known(self) -> dict[str, KnownBase]:
        return {
            module: KnownBase(sketch_linear(*layer.base_parameters()), layer.basis, layer.basis_bias)
            for module, layer in self._layers.items()
        }

    def _load(self, name: str, directory: str | os.PathLike[str], strict: bool, known: Mapping[str, KnownBase]) -> None:
        self._require_new(name)
        checkpoint = read_checkpoint(Path(directory) / TENSORS_FILE)
        related = [layer for layer, info in checkpoint.header["layers"].items() if "method" in info]
        if related:
            method = checkpoint.header["layers"][related[0]]["method"]
            raise ValueError(f"adapter {name!r}: layer {related[0]!r} is of {method}; an AdapterBank holds AdaMSS")

        def find(module: str) -> nn.Module:
            in_bank = self._layers.get(module)
            if in_bank is not None:
                return in_bank.plain()
            try:
                return self.model.get_submodule(module)
            except AttributeError:
                raise ValueError(f"adapter {name!r}: this model has no module {module!r}") from None

        try:
            built, states = build_layers(find, checkpoint, strict, known=known)
        except ValueError as error:
            raise ValueError(f"adapter {name!r}: {error}") from error
        layers: dict[str, Any] = built
        heads = {module: _head(name, module, find(module)) for module in states}
        for module, head in heads.items():
            head.load_state_dict(states[module])
        self._put(name, layers, heads)

    def add(self, name: str, config: AdaMSSConfig, *, progress: bool = False) -> None:
        """Add a new adapter to train, which at first computes what the base model does.

        Args:
            name: What the adapter is called here.
            config: As for `inject_adamss`. Of all adapters in a bank the fields that shape subspaces have to agree, and
                so have the layers. `use_asa` is not for adapters in a bank.
            progress: Show a progress bar while the first adapter's layers are decomposed.

        Raises:
            ValueError: The name is taken, or the config does not fit the bank or the model; nothing is changed.
            TypeError: As `inject_adamss`.
        """
        from tqdm.auto import tqdm

        require_config(config)
        self._require_new(name)
        if config.use_asa:
            raise ValueError(f"config.use_asa: expected False for adapter {name!r}; train it alone to prune it")
        self._require_same_config(name, config)
        if self._layers:
            layers = {module: layer.untrained(module) for module, layer in self._layers.items()}
        else:
            targets = target_linears(self.model, config)
            with tqdm(targets.items(), desc="AdaMSS init", unit="layer", disable=not progress) as bar:
                made = {base: adapt(module, base, config) for module, base in bar}
            layers = {module: made[linear] for module, linear in targets.items()}
        heads = {
            module: _head(name, module, found)
            for module, found in modules_named(self.model, config.modules_to_save or ()).items()
        }
        self._put(name, layers, heads)

    def save(self, name: str, directory: str | os.PathLike[str], *, compact: bool = False) -> Path:
        """Save an adapter, for `load` and for `load_adapter`; see `save_adapter`.

        Args:
            name: Of the adapter.
            directory: Created where missing.
            compact: As in `save_adapter`.

        Returns:
            The path of the safetensors file.

        Raises:
            ValueError: There is no such adapter, or as `save_adapter`.
        """
        slot = self._slot(name)
        layers = {module: layer.take(slot) for module, layer in self._layers.items()}
        heads = {module: head.take(slot) for module, head in self._heads.items()}
        return write_layers(layers, heads, Path(directory), compact=compact)

    def unload(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            ValueError: There is no such adapter.
            RuntimeError: A batch that takes it is under way.
        """
        with self._lock:
            slot = self._slot(name)
            if self._in_use[name]:
                raise RuntimeError(f"adapter {name!r}: a batch that takes it is under way")
            of_slots: list[BankLinear | BankHead] = [*self._layers.values(), *self._heads.values()]
            for module in of_slots:
                module.clear(slot)
            del self._slots[name]

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Return the parameters of an adapter: B and C of each layer, and what it trains whole.

        Raises:
            ValueError: There is no such adapter.
        """
        slot = self._slot(name)
        of_layers = [leaf for layer in self._layers.values() for leaf in layer.leaves(slot)]
        return of_layers + [p for head in self._heads.values() for p in head.take(slot).parameters()]

    @contextlib.contextmanager
    def select(self, names: Sequence[str | None]) -> Iterator[None]:
        """Let row i of the batches inside take adapter names[i].

        For this thread and task alone. Where a batch has a multiple of so many rows, each name stands for as many rows
        side by side, as `generate` expands beams.

        Args:
            names: For each row of the first dimension a name, or None for the base alone.

        Raises:
            ValueError: A name is not an adapter's; or, when the model is called, the batch has another number of rows.
        """
        if isinstance(names, str):
            raise ValueError(f"names: expected a name, or None, for each row, got the string {names!r}")
        with self._lock:
            unknown = sorted({str(name) for name in names if name is not None and name not in self._slots})
            if unknown:
                raise ValueError(f"names: expected adapters out of {self.names}, or None, got {unknown}")
            batch = MixedBatch(names, self._slots)
            for layer, slot in itertools.product(self._layers.values(), batch.slots):
                layer.follow(slot)
            used = {name for name in names if name is not None}
            self._in_use.update(used)
        try:
            with under_way(self._number, batch):
                yield
        finally:
            with self._lock:
                self._in_use.subtract(used)

    def _put(self, name: str, layers: Mapping[str, FusedAdaMSSLinear], heads: Mapping[str, nn.Linear]) -> None:
        """Take an adapter in, after checking all of it."""
        with self._lock:
            self._require_new(name)
            if self._layers:
                layers = self._fitted(name, layers)
                if heads.keys() != self._heads.keys():
                    other = min(heads.keys() ^ self._heads.keys())
                    raise ValueError(f"adapter {name!r}: module {other!r} is saved whole by some of the adapters only")
            else:
                for module in layers:
                    if is_offloaded(self.model.get_submodule(module)):
                        raise ValueError(
                            f"{module}: accelerate takes its weight away after each call (offload); an AdapterBank is "
                            "for layers whose weights stay"
                        )
                # One layer for all the names that a shared module has.
                shared = {layer.weight: bank_layer(layer, self._number) for layer in layers.values()}
                self._layers = {module: shared[layer.weight] for module, layer in layers.items()}
                originals: Any = {module: self.model.get_submodule(module) for module in heads}
                self._heads = {module: BankHead(o, self._number) for module, o in originals.items()}
                self._config = next(iter(layers.values())).config
                self.model.requires_grad_(False)
                swap(self.model, {**self._layers, **self._heads})
            slot = next(i for i in itertools.count() if i not in self._slots.values())
            for module, layer in self._layers.items():
                if slot >= layer.capacity:
                    layer.grow(max(4, 2 * layer.capacity))
                layer.put(slot, layers[module])
            for module, head in self._heads.items():
                head.put(slot, heads[module])
            self._slots[name] = slot

    def _fitted(self, name: str, layers: Mapping[str, FusedAdaMSSLinear]) -> dict[str, FusedAdaMSSLinear]:
        """Return the layers on the bank's basis, or raise a `ValueError` where they do not fit it."""
        if layers.keys() != self._layers.keys():
            other = min(layers.keys() ^ self._layers.keys())
            raise ValueError(f"adapter {name!r}: layer {other!r} is adapted by some of the adapters only")
        self._require_same_config(name, next(iter(layers.values())).config)
        fitted = {}
        for module, layer in layers.items():
            fitted[module] = _onto(name, module, layer, self._layers[module])
        return fitted

    def _require_same_config(self, name: str, config: AdaMSSConfig) -> None:
        if self._config is None:
            return
        # What shapes the subspaces, and which layers have them.
        for field in (
            *("r", "num_subspaces", "subspace_rank", "use_dynamic_rank", "svd_threshold", "random_seed"),
            *("init_weights", "target_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
        ):
            got, expected = getattr(config, field), getattr(self._config, field)
            if got != expected:
                raise ValueError(f"adapter {name!r}: config.{field}: expected the bank's, {expected!r}, got {got!r}")

    def _require_new(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(f"name: expected a string that is not empty, got {name!r}")
        if name in self._slots:
            raise ValueError(f"name: adapter {name!r} is there already; unload it first")

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_in_use", "_number")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy's rows are not the original's.
        self.__dict__ |= state | {"_lock": threading.RLock(), "_in_use": Counter(), "_number": next(_numbers)}
        of_bank: list[BankLinear | BankHead] = [*self._layers.values(), *self._heads.values()]
        for module in of_bank:
            module.bank = self._number

    def _slot(self, name: str) -> int:
        if name not in self._slots:
            raise ValueError(f"name: expected one of {self.names}, got {name!r}")
        return self._slots[name]

    def _give_back(self) -> None:
        """Put the base model's own layers back."""
        plain: dict[str, nn.Module] = {module: layer.plain() for module, layer in self._layers.items()}
        swap(self.model, plain | {module: head.plain() for module, head in self._heads.items()})


def _head(name: str, module: str, found: nn.Module) -> nn.Linear:
    """Return a copy of a module that an adapter trains whole."""
    if isinstance(found, BankHead):
        found = found.plain()
    if type(found) is not nn.Linear:
        kind = type(found).__qualname__
        raise ValueError(
            f"adapter {name!r}: module {module!r} is a {kind}; of what adapters train whole, a batch can only mix "
            "torch.nn.Linear"
        )
    head = nn.Linear(found.in_features, found.out_features, found.bias is not None, found.weight.device)
    head = head.to(found.weight.dtype)
    head.load_state_dict(found.state_dict())
    return head


@torch.no_grad()
def _onto(name: str, module: str, layer: FusedAdaMSSLinear, bank: BankLinear) -> FusedAdaMSSLinear:
    """Return `layer`, moved onto the bank's basis where its own is another."""
    where = f"adapter {name!r}: layer {module!r}"
    if layer.layout.ranks != bank.layout.ranks or layer.basis.shape != bank.basis.shape:
        expected, got = (f"R = {x.basis.shape[0]} and ranks {x.layout.ranks}" for x in (bank, layer))
        raise ValueError(f"{where}: expected {expected}, as the bank has, got {got}")
    if not torch.equal(layer.row_subspace, bank.row_subspace):
        moved = int((layer.row_subspace != bank.row_subspace).sum())
        raise ValueError(
            f"{where}: {moved} of {layer.out_features} rows lie in other subspaces than in the bank: the adapter was "
            "trained on another base, or a rounded copy of it that clusters otherwise"
        )
    if torch.equal(layer.basis, bank.basis) and _equal(layer.basis_bias, bank.basis_bias):
        return layer
    own, shared = (augmented(x.basis, x.basis_bias).to(torch.float64) for x in (layer, bank))
    update = layer.B.to(torch.float64) @ own
    B = torch.linalg.lstsq(shared.T, update.T).solution.T
    error = ((B @ shared - update).norm() / update.norm()).item()
    message = f"{where}: on the bank's basis its update is off by {error:.2g} (relative)"
    if not error <= SIMILAR_UPDATE:
        raise ValueError(f"{message}; up to {SIMILAR_UPDATE} is taken: it was trained on another base")
    if error > SAME_UPDATE:
        warnings.warn(message, BaseWeightWarning, 7)
    else:
        logger.info("%s", message)
    layer.B.copy_(B)
    return layer


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is None or other is None or torch.equal(one, other)
