"""The engine that trains what is alive: the part of a network that a mask leaves to be trained.

`compaction` says which part that is. It is a network of its own, with variables of its own, which
the loop of `graph.Graph` trains; in between, results are written into the whole network. Entries
that are left out have gradient zero; they get what the optimizer does to such: nothing, or where
weights decay or a slot is not zero, as many steps of it. Moving statistics of a batch normalisation
that are left out keep the values that they had: no output depends on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lth_tf import compaction, pruning
from lth_tf.compaction import Net, Part, Places
from lth_tf.compat import keras, tf
from lth_tf.masks import Mask
from lth_tf.models import policy
from lth_tf.pruning.inside import rate_of
from lth_tf.pruning.slots import slots_for
from lth_tf.recipes import RECIPES
from lth_tf.training.graph import Graph, Setup, compiles
from lth_tf.training.optimizers import OPTIMIZERS, learning_rate
from lth_tf.training.reduction import Reduction

# Each entry by itself, from its own gradient and slots alone.
_ELEMENTWISE = (keras.optimizers.SGD, keras.optimizers.Adam, keras.optimizers.AdamW)
# Seconds of a step for each multiply-add, and for each trained number; to build and compile a
# network, and for each of its layers. Of one machine: on another the ratios are about the same.
_COSTS = {"dense": 1.5e-11, "conv": 6e-11, "weights": 3e-10}
_BUILD, _BUILD_LAYER = 2.0, 0.2


def unfit(setup: Setup) -> str | None:
    """Returns why an engine of this kind cannot train something, as half a sentence, or None."""
    optimizer = setup.optimizer
    if RECIPES[setup.spec.recipe].moves(setup.spec):
        return "masks move, and a network would have to be built for each"
    if setup.strategy.num_replicas_in_sync > 1:
        return "several replicas share a batch"
    if pruning.inner_optimizer(optimizer) is not optimizer:
        return "the loss is scaled, and a step that overflows anywhere is left out everywhere"
    if type(optimizer) not in _ELEMENTWISE:
        return f"{type(optimizer).__name__} may treat an entry as others' gradients want it"
    for option in ("clipnorm", "global_clipnorm", "use_ema"):
        if optimizer.get_config().get(option):
            return f"the optimizer has {option}, which others' gradients or more steps matter to"
    try:
        Net(setup.model)
    except ValueError as error:
        return str(error)
    return None


def start_of(model: Any) -> dict[str, np.ndarray]:
    """Returns name -> array of the trained vectors of a model: biases, and those of norms."""
    return {n: v.numpy() for n, v in pruning.weights(model).items() if v.trainable and _flat(v)}


def _flat(variable: Any) -> bool:
    return len(variable.shape) == 1


class Compact:
    """An engine; for its methods see `graph.Graph`.

    The part does not change while the mask does not: what is left out never moves, and a bias that
    became negative in training has moved. So a training that was interrupted goes on as it was.

    Args:
      setup: what trains, of which `unfit` says nothing.
      start: `start_of` the model when the training began; see `look`.
    """

    apart = True

    def __init__(self, setup: Setup, start: Mapping[str, np.ndarray]):
        self.setup, self._net = setup, Net(setup.model)
        self.look(start)
        feed, spec = setup.feed, setup.spec
        self.blocks = feed.loops and compiles(spec, 1, setup.model)
        self._part: Part | None = None
        self._graph: Any = None

    def look(self, start: Mapping[str, np.ndarray]) -> None:
        """Takes note of how another training begins."""
        self._start = dict(start)

    # --- Which part ---

    def part(self, mask: Mask) -> Part:
        """Returns the part of the network that is trained under a mask."""
        return self._net.alive(mask, self._still())

    def _still(self) -> dict[str, np.ndarray]:
        """What `Net.alive` is to know of vectors."""
        found = {}
        for name, v in pruning.weights(self.setup.model).items():
            if not _flat(v):
                continue
            value = v.numpy()
            still = value == 0
            if name in self._start:
                if not self.setup.spec.weight_decay:
                    still |= (value < 0) & (value == self._start[name])
                for slot in slots_for(self.setup.optimizer, v):
                    still &= slot.numpy() == 0
            found[name] = still
        return found

    def pays(self, mask: Mask, steps: int) -> bool:
        """Says whether a training is quicker with this engine, going by a table of costs.

        Args:
          mask: that it begins with.
          steps: of it.
        """
        whole, part = self._net.work(), self._net.work(self.part(mask))
        batch = 3 * self.setup.spec.batch_size  # forward, and backward to inputs and weights
        times = {"dense": batch, "conv": batch, "weights": 1}
        saved = sum(_COSTS[k] * times[k] * (whole[k] - part[k]) for k in _COSTS)
        return steps * saved > _BUILD + _BUILD_LAYER * len(self._net.nodes)

    # --- There and back ---

    def begin(self, mask: Mask) -> None:
        """Takes over from the variables of model and optimizer."""
        part = self.part(mask)
        if part != self._part:
            self._build(part)
        for whole, small, places in self._pairs:
            small.assign(whole.numpy()[np.ix_(*places)])
        for whole, small in self._scalars:
            small.assign(whole)
        own = {name: m[np.ix_(*self._places[name])] for name, m in mask.items()}
        pruning.set_mask(self._model, own)
        self._graph.begin(own)
        self._rest = _Rest(self.setup, mask, self._places)
        self._synced = int(self.setup.optimizer.iterations.numpy())

    def _build(self, part: Part) -> None:
        setup, spec = self.setup, self.setup.spec
        with setup.strategy.scope(), policy(spec.precision):
            model = pruning.prune(self._net.small(part), wall=False)
            model.compile(OPTIMIZERS[spec.optimizer](learning_rate(spec), spec))
            optimizer = model.optimizer
            optimizer.build(model.trainable_variables)
        self._part, self._model = part, model
        self._places = places = self._net.places(part)
        reduction = Reduction(model, setup.strategy, spec.communication)
        self._graph = Graph(
            Setup(spec, setup.task, model, optimizer, setup.feed, setup.strategy, reduction)
        )
        self._pairs: list[tuple[Any, Any, Places]] = []
        small = pruning.weights(model)
        for name, v in pruning.weights(setup.model).items():
            both = (v, setup.optimizer), (small[name], optimizer)
            held, own = ([one, *slots_for(theirs, one)] for one, theirs in both)
            self._pairs += [(*each, places[name]) for each in zip(held, own, strict=True)]
        self._scalars = [(setup.optimizer.iterations, optimizer.iterations)]
        if isinstance(rate_of(setup.optimizer), tf.Variable):  # a callback may change it
            self._scalars.append((rate_of(setup.optimizer), rate_of(optimizer)))

    def sync(self) -> None:
        """Puts what training changed into the variables of model and optimizer."""
        now = int(self._model.optimizer.iterations.numpy())
        self._rest.advance(self._synced, now)
        for whole, small, places in self._pairs:
            value = np.array(whole.numpy())
            value[np.ix_(*places)] = small.numpy()
            whole.assign(value)
        self.setup.optimizer.iterations.assign(now)
        self._synced = now

    # --- In between ---

    def advance(self, step: int, end: int, seed: int, total: float) -> tuple[float, int]:
        """Does the steps step .. end - 1, as `Graph.advance`.

        Args:
          step, end, seed, total: see there.
        """
        return self._graph.advance(step, end, seed, total)

    def course(
        self, step: int, end: int, seed: int, best: float
    ) -> tuple[list[list[float]], int]:
        """Does those steps with the evaluations that are due, as `Graph.course`.

        Args:
          step, end, seed, best: see there.
        """
        return self._graph.course(step, end, seed, best)

    def evaluate(self, part: str) -> tuple[float, float]:
        """Returns the sums of losses and of hits on a part."""
        return self._graph.evaluate(part)


class _Rest:
    """The trained numbers that are left out of a part, and what an optimizer does to them.

    Args:
      setup: what trains.
      mask: kernel name -> 0/1 array; pruned weights are none of them.
      places: see `Net.places`.
    """

    def __init__(self, setup: Setup, mask: Mask, places: Mapping[str, Places]):
        self._setup = setup
        self._held: list[tuple[Any, list[Any], np.ndarray]] = []  # variable, slots, which entries
        for name, v in pruning.weights(setup.model).items():
            if v.trainable:
                out = compaction.left_out(tuple(v.shape), places[name])
                out &= mask.get(name, out) != 0
                if out.any():
                    self._held.append((v, slots_for(setup.optimizer, v), out))
        moved = (slot.numpy()[out] != 0 for _, slots, out in self._held for slot in slots)
        if not setup.spec.weight_decay and not any(each.any() for each in moved):
            self._held = []  # nothing happens to them

    def advance(self, first: int, end: int) -> None:
        """Has the optimizer do its steps number first .. end - 1 at gradient zero."""
        if not self._held or first == end:
            return
        spec, theirs = self._setup.spec, self._setup.optimizer
        joined = tf.Variable(np.concatenate([v.numpy()[out] for v, _, out in self._held]))
        with policy(spec.precision):
            optimizer = OPTIMIZERS[spec.optimizer](learning_rate(spec), spec)
            optimizer.build([joined])
        optimizer.iterations.assign(first)
        if isinstance(rate_of(theirs), tf.Variable):
            rate_of(optimizer).assign(rate_of(theirs))
        slots = slots_for(optimizer, joined)
        for i, slot in enumerate(slots):
            slot.assign(np.concatenate([held[i].numpy()[out] for _, held, out in self._held]))
        coupled = spec.weight_decay and not OPTIMIZERS.about(spec.optimizer).decoupled

        def body(i: Any) -> Any:
            decay = spec.weight_decay if coupled else 0.0
            optimizer.apply_gradients([(decay * joined, joined)])
            return i + 1

        @tf.function(jit_compile=True, autograph=False)
        def steps(count: Any) -> None:
            tf.while_loop(lambda i: i < count, body, [tf.constant(0)], parallel_iterations=1)

        steps(tf.constant(end - first))
        at = 0
        for variable, held, out in self._held:
            size = int(out.sum())
            for one, new in zip([variable, *held], [joined, *slots], strict=True):
                value = one.numpy()
                value[out] = new.numpy()[at : at + size]
                one.assign(value)
            at += size
