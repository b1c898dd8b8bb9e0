"""inside: what tf_keras does not promise and is asked nevertheless still means what is asked.

After another version of tf_keras or TensorFlow these tests fail first. And no other module may
ask such a thing: their code is read for it.
"""

import ast
import functools
import inspect
import logging
import pathlib
import re
import time

import numpy as np
import pytest

from lth_tf.compat import keras, tf
from lth_tf.errors import UserError
from lth_tf.pruning import inside as pruning
from lth_tf.pruning import prune
from lth_tf.scorers import inside as scorers

ROOT = pathlib.Path(__file__).resolve().parent.parent
layers, optimizers = keras.layers, keras.optimizers


@pytest.fixture
def bfloat16():
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    yield
    keras.mixed_precision.set_global_policy("float32")


def dense(*shape, **options):
    """A built Dense layer."""
    layer = layers.Dense(shape[-1], **options)
    layer.build((None, *shape[:-1]))
    return layer


def functional(*inner):
    x = y = keras.Input((3,))
    for layer in inner:
        y = layer(y)
    return keras.Model(x, y)


class Holder(layers.Layer):
    """Layers as an attribute, in a list and in a dict; a list of numbers."""

    def __init__(self):
        super().__init__()
        self.first = layers.Dense(2, name="first")
        self.more = [layers.Dense(2, name="more"), keras.Sequential([layers.Dense(2, name="deep")])]
        self.named = {"x": layers.Dense(2, name="named")}
        self.numbers = (1, 2)


def one_replica():
    return tf.distribute.MirroredStrategy(
        ["CPU:0"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


# --- pruning.inside: layers and models -------------------------------------------------


def test_pruning_layers_within():
    holder = Holder()
    found = pruning.layers_within(holder)
    assert found[0] is holder and len(found) == len(set(map(id, found))) == 6
    names = [layer.name for layer in found]
    assert {"first", "more", "deep", "named"} < set(names)
    assert found.index(holder.more[1]) < names.index("deep")


def test_pruning_sublayers():
    holder = Holder()
    expected = [holder.first, *holder.more, holder.named["x"]]
    assert list(map(id, pruning.sublayers(holder))) == list(map(id, expected))
    assert pruning.sublayers(layers.Dense(2)) == []


def test_pruning_own_weights():
    class Own(layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = dense(3, 2)
            self.count = self.add_weight("count", (), trainable=False)
            self.scale = self.add_weight("scale", ())

    layer = Own()
    assert len(layer.weights) == 4
    for trainable in (True, False):
        layer.trainable = trainable
        assert [v.name for v in pruning.own_weights(layer)] == ["scale:0", "count:0"]


def test_pruning_is_graph_network():
    class Subclassed(keras.Model):
        pass

    class Named(keras.Model):
        def __init__(self):
            x = keras.Input((3,))
            super().__init__(x, layers.Dense(2)(x))

    for model in (functional(layers.Dense(2)), keras.Sequential([keras.Input((3,))]), Named()):
        assert pruning.is_graph_network(model) is True
    for other in (Subclassed(), keras.Sequential([layers.Dense(2)]), layers.Dense(2)):
        assert pruning.is_graph_network(other) is False


def test_pruning_is_tracked():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.one, self.number, self.text = layers.Dense(2), 3, "x"
            self.several, self.by_name = [layers.Dense(2)], {"a": layers.Dense(2)}

    model = Model()
    tracked = {name for name, value in vars(model).items() if pruning.is_tracked(model, value)}
    assert {"one", "several", "by_name"} <= tracked and not tracked & {"number", "text"}


def test_pruning_traced_functions():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    model.compile("sgd", "mse")
    assert set(pruning.traced_functions(model).values()) == {None}
    x, y = np.ones((2, 3)), np.ones((2, 2))
    begin = [lambda: model.fit(x, y, verbose=0), lambda: model.evaluate(x, y, verbose=0)]
    for run in [*begin, lambda: model.predict(x, verbose=0)]:
        before = pruning.traced_functions(model)
        run()
        after = pruning.traced_functions(model)
        (new,) = [name for name in after if after[name] is not before[name]]
        setattr(model, new, None)  # then it is traced again
        run()
        assert pruning.traced_functions(model)[new] not in (None, after[new])
    assert None not in pruning.traced_functions(model).values()


def test_pruning_holds_symbolic_loss():
    model = functional(layers.Dense(2, activity_regularizer="l2"))
    assert not any(map(pruning.holds_symbolic_loss, pruning.layers_within(model)))
    for add in (model.add_loss, functools.partial(model.add_metric, name="m")):
        before = pruning.layers_within(model)
        add(tf.reduce_mean(model.outputs[0]))
        added = [x for x in pruning.layers_within(model) if not any(x is y for y in before)]
        assert sum(map(pruning.holds_symbolic_loss, added)) == 1


def test_pruning_automatic_name():
    class _HTTPLayer2D(layers.Layer):
        pass

    made = [
        layers.Dense(2), layers.Conv2DTranspose(2, 3), layers.LSTM(2), _HTTPLayer2D(),
        keras.Sequential(), functional(layers.Dense(2)), Holder(),
    ]  # fmt: skip
    for layer in made:
        assert re.fullmatch(rf"{pruning.automatic_name(layer)}(_\d+)?", layer.name), layer.name
    assert pruning.automatic_name(made[-2]) == "model"


def test_pruning_was_named():
    for given in ({"name": "dense_2"}, {"name": "dense_2", "activation": "relu"}):
        layer = layers.Dense(2, **given)
        assert pruning.was_named(layer)
        # Of a copy it is not known.
        assert not pruning.was_named(layers.Dense.from_config(layer.get_config()))
    assert not pruning.was_named(layers.Dense(2))
    assert not pruning.was_named(keras.Sequential(name="x"))
    holder = keras.Sequential([layers.LSTM(2), layers.Bidirectional(layers.GRU(2))])
    assert not any(re.search(r"_\d+$", v.name) and pruning.was_named(v)
                   for v in pruning.layers_within(holder))  # fmt: skip


def test_pruning_is_revived(tmp_path):
    class Forgotten(layers.Layer):
        def call(self, x):
            return x + 1.0

    model = functional(Forgotten(name="forgotten"), layers.Dense(2, name="known"))
    assert not any(map(pruning.is_revived, pruning.layers_within(model)))
    model.save(tmp_path / "m")
    loaded = keras.models.load_model(tmp_path / "m")
    found = {layer.name for layer in pruning.layers_within(loaded) if pruning.is_revived(layer)}
    assert found == {"forgotten"}


@pytest.mark.parametrize("often", ["epoch", 1])
def test_pruning_was_resumed(often, tmp_path):
    class Look(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            found.append(pruning.was_resumed(self.model))

        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    found = []
    for _ in range(2):
        model = functional(dense(3, 2))
        model.compile("sgd", "mse")
        assert not pruning.was_resumed(model)
        backup = keras.callbacks.BackupAndRestore(tmp_path / "b", save_freq=often)
        with pytest.raises(KeyboardInterrupt):
            x, y = np.ones((2, 3)), np.ones((2, 2))
            model.fit(x, y, 1, 2, verbose=0, callbacks=[backup, Look()])
    assert found == [False, True]
    model.fit(x, y, 1, 2, verbose=0, callbacks=[backup])
    assert not pruning.was_resumed(model)


def test_pruning_set_untracked():
    layer, kernel = dense(3, 2), None
    for value in (tf.ones((3, 2)), layer.kernel):
        kernel = kernel if kernel is not None else layer.kernel
        pruning.set_untracked(layer, "kernel", value)
        assert layer.kernel is value and [id(v) for v in layer.weights][0] == id(kernel)
    np.testing.assert_array_equal(layer(tf.ones((1, 3))), tf.ones((1, 3)) @ kernel + layer.bias)
    layer.kernel = tf.ones((3, 2))  # what it is for: this way the weight would be gone
    assert len(layer.weights) == 1


def test_pruning_treat_alike():
    class Wrapper(layers.Wrapper):
        def __init__(self, layer):
            super().__init__(layer, dtype="float64")
            pruning.treat_alike(self, layer)

        def call(self, *args, **kwargs):
            return self.layer.call(*args, **kwargs)

    class Inner(layers.Layer):
        def call(self, inputs, training=None, mask=None):
            self.seen = training, mask, inputs.dtype
            return inputs

    model = keras.Sequential([layers.Masking(), Wrapper(Inner())])
    model(tf.zeros((1, 2, 3)), training=True)
    training, mask, _ = model.layers[1].layer.seen
    assert training is True and not mask.numpy().any()
    wrapper = Wrapper(Inner(autocast=False))
    wrapper(tf.zeros((1, 3), tf.float32))
    assert wrapper.layer.seen[2] == tf.float32
    assert keras.Sequential([Wrapper(layers.Dense(2, input_shape=(3,)))]).input_shape == (None, 3)
    assert not keras.Sequential([Wrapper(layers.Dense(2))]).built


# --- pruning.inside: losses of layers --------------------------------------------------


def test_pruning_add_activity_loss():
    class Outer(layers.Layer):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def call(self, x):
            outputs = self.inner.call(x)
            pruning.add_activity_loss(self.inner, outputs)
            return outputs

    x = tf.ones((4, 3))
    inner = dense(3, 2, activity_regularizer="l1")
    inner(x)
    (expected,) = inner.losses
    outer = Outer(inner)
    outer(x)
    assert [float(loss) for loss in outer.losses] == [float(expected)] != [0.0]
    outer = Outer(dense(3, 2))
    outer(x)
    assert outer.losses == []


def test_pruning_weight_losses():
    layer = dense(3, 2, kernel_regularizer="l2")
    losses = pruning.weight_losses(layer)
    assert [float(loss()) for loss in losses] == [float(loss) for loss in layer.losses] != [0.0]
    losses[0] = lambda: tf.constant(7.0)
    assert [float(loss) for loss in layer.losses] == [7.0]


def test_pruning_set_weight_losses():
    layer = dense(3, 2, kernel_regularizer="l2")
    before = [float(loss) for loss in layer.losses]
    found = list(pruning.weight_losses(layer))
    pruning.set_weight_losses(layer, [lambda: tf.constant(7.0), *found])
    assert [float(loss) for loss in layer.losses] == [7.0, *before]
    pruning.set_weight_losses(layer, [])
    assert layer.losses == []


def test_pruning_regularization():
    layer = dense(3, 2, kernel_regularizer=keras.regularizers.OrthogonalRegularizer())
    layer.add_loss(lambda: tf.constant(7.0))
    known, other = map(pruning.regularization, pruning.weight_losses(layer))
    assert other is None and known.args == (layer.kernel,)
    assert float(known()) == float(layer.losses[0]) != 0
    assert float(known.func(tf.zeros((3, 2)))) == 0


def test_pruning_regularizer_of():
    layer = dense(3, 2, kernel_regularizer="l2")
    layer.add_loss(functools.partial(tf.nn.l2_loss, layer.kernel))
    known, own = map(pruning.regularization, pruning.weight_losses(layer))
    assert pruning.regularizer_of(known) is layer.kernel_regularizer
    assert pruning.regularizer_of(own) is None


def test_pruning_mark_weight_loss():
    own, marked = tf.constant(7.0), tf.constant(7.0)
    pruning.mark_weight_loss(marked)
    (keras_own,) = dense(3, 2, kernel_regularizer="l2").losses
    new = set(vars(marked)) - set(vars(own))
    assert len(new) == 1 and {name: vars(keras_own)[name] for name in new} == {
        name: vars(marked)[name] for name in new
    }


# --- pruning.inside: variables ---------------------------------------------------------


def test_pruning_casts_itself(bfloat16):
    mixed = [dense(3, 2)]
    with one_replica().scope():
        mixed.append(dense(3, 2))
    plain = dense(3, 2, dtype="float32")
    for layer in mixed:
        assert pruning.casts_itself(layer.kernel) and layer(tf.ones((1, 3))).dtype == tf.bfloat16
    assert not pruning.casts_itself(plain.kernel) and not pruning.casts_itself(tf.Variable(1.0))


def test_pruning_stored_dtype(bfloat16):
    class Asking(layers.Dense):
        def call(self, x):
            self.seen = self.kernel.dtype, pruning.stored_dtype(self.kernel)
            return super().call(x)

    layer = Asking(2)
    layer(tf.ones((1, 3)))
    assert layer.seen == (tf.bfloat16, tf.float32)
    assert pruning.stored_dtype(tf.Variable(1, dtype=tf.int64)) == tf.int64


def test_pruning_parts(bfloat16):
    alone = tf.Variable([1.0])
    assert len(pruning.parts(alone)) == 1 and pruning.parts(alone)[0] is alone
    with one_replica().scope():
        kernel = dense(3, 2).kernel
    assert pruning.casts_itself(kernel)
    assert [type(part) for part in pruning.parts(kernel)] == [type(alone)]


def test_pruning_constrain(bfloat16):
    def twice(value):
        return 2 * value

    with one_replica().scope():
        mirrored = dense(3, 2).kernel
    for variable in (tf.Variable([1.0]), dense(3, 2).kernel, mirrored):
        pruning.constrain(variable, twice)
        assert variable.constraint is twice
        assert all(part.constraint is twice for part in pruning.parts(variable))
        pruning.constrain(variable, None)
        assert variable.constraint is None


# --- pruning.inside: optimizers --------------------------------------------------------


def test_pruning_slots():
    kernel, bias, stranger = tf.Variable([1.0, 2.0]), tf.Variable(3.0), tf.Variable(4.0)
    optimizer = optimizers.Adam(0.5, use_ema=True)
    assert pruning.slots(optimizer, kernel) == []
    optimizer.build([kernel, bias])
    assert pruning.slots(optimizer, stranger) == [] and kernel.name == bias.name
    known, found = {id(v) for v in optimizer.variables}, pruning.slots(optimizer, kernel)
    for variable, its in ((kernel, found), (bias, pruning.slots(optimizer, bias))):
        assert len(its) == 3 and {id(slot) for slot in its} < known
        assert {tuple(slot.shape) for slot in its} == {tuple(variable.shape)}
    optimizer.apply_gradients([(tf.constant([1.0, 0.0]), kernel), (tf.constant(1.0), bias)])
    assert all(slot.numpy()[0] != 0 for slot in found)
    assert sum(slot.numpy()[1] == 0 for slot in found) == 2  # moments, not the average
    with one_replica().scope():
        mirrored = tf.Variable([1.0, 2.0])
        optimizer = optimizers.Adam(0.5)
        optimizer.build([mirrored])
    assert len(pruning.slots(optimizer, mirrored)) == 2


@pytest.mark.parametrize("legacy", [False, True])
def test_pruning_optimizer_at_work(legacy):
    family, found = optimizers.legacy if legacy else optimizers, []

    def constraint(variable):
        found.append(pruning.optimizer_at_work())
        return variable + 1.0

    kernel = tf.Variable([1.0, 2.0])
    pruning.constrain(kernel, constraint)
    inner = family.SGD(0.5)
    for optimizer in (inner, keras.mixed_precision.LossScaleOptimizer(inner)):
        optimizer.apply_gradients([(tf.constant([0.0, 2.0]), kernel)])

    @tf.function
    def step():
        inner.apply_gradients([(tf.constant([0.0, 0.0]), kernel)])

    step()
    assert found and all(each is inner for each in found)
    assert kernel.numpy()[0] == 4.0
    constraint(kernel)
    assert found[-1] is None


def test_pruning_is_optimizer():
    for optimizer in (optimizers.SGD(), optimizers.legacy.SGD()):
        scaled = keras.mixed_precision.LossScaleOptimizer(optimizer)
        assert pruning.is_optimizer(optimizer) and pruning.is_optimizer(scaled)
    assert not pruning.is_optimizer(dense(3, 2))


def test_pruning_is_built():
    optimizer = optimizers.Adam(0.5)
    assert not pruning.is_built(optimizer)
    optimizer.build([tf.Variable(3.0)])
    assert pruning.is_built(optimizer)


def test_pruning_built_for():
    kernel, bias, stranger = tf.Variable([1.0, 2.0]), tf.Variable(3.0), tf.Variable(4.0)
    optimizer = optimizers.Adam(0.5)
    assert pruning.built_for(optimizer, [kernel]) == []
    optimizer.build([bias, kernel])
    found = pruning.built_for(optimizer, [kernel, stranger, bias])
    assert len(found) == 2 and found[0] is bias and found[1] is kernel


@pytest.mark.parametrize("legacy", [False, True])
def test_pruning_build_optimizer(legacy):
    weight = tf.Variable([1.0, 2.0])
    optimizer = (optimizers.legacy if legacy else optimizers).Adam(0.5)
    pruning.build_optimizer(optimizer, [weight])
    variables = optimizer.variables() if legacy else optimizer.variables
    assert sum(v.shape == weight.shape for v in variables) == 2
    assert int(optimizer.iterations) == 0


@pytest.mark.parametrize("legacy", [False, True])
def test_pruning_strategy_of(legacy):
    family, strategy = optimizers.legacy if legacy else optimizers, one_replica()
    with strategy.scope():
        optimizer = family.Adam(0.5)
    assert pruning.strategy_of(optimizer) is strategy
    assert pruning.strategy_of(family.Adam(0.5)) is tf.distribute.get_strategy()


def test_pruning_rate_of():
    schedule = optimizers.schedules.ExponentialDecay(0.5, 10, 0.9)
    optimizer = optimizers.SGD(schedule)
    assert pruning.rate_of(optimizer) is schedule is not optimizer.learning_rate
    optimizer = optimizers.SGD(0.5)
    optimizer.learning_rate = 0.25
    rate = pruning.rate_of(optimizer)
    assert isinstance(rate, tf.Variable) and float(rate) == 0.25
    rate.assign(0.125)
    assert float(optimizer.learning_rate) == 0.125


@pytest.mark.parametrize("legacy", [False, True])
def test_pruning_loss_scale(legacy):
    scaled, family = keras.mixed_precision.LossScaleOptimizer, optimizers
    family = family.legacy if legacy else family
    optimizer = scaled(family.SGD(0.5))
    scale, counter = pruning.loss_scale(optimizer)
    scale.assign(8.0)
    assert float(optimizer.get_scaled_loss(tf.constant(1.0))) == 8
    weight = tf.Variable(1.0)
    optimizer.apply_gradients([(tf.constant(8.0), weight)])
    assert int(counter) == 1
    assert pruning.loss_scale(scaled(family.SGD(0.5), dynamic=False, initial_scale=2.0)) == []
    assert pruning.loss_scale(family.SGD(0.5)) == []


# --- scorers.inside --------------------------------------------------------------------


def test_scorers_replaced():
    layer = dense(3, 2)
    kernel, held = layer.kernel, dict(vars(layer))
    other = [(layer, "kernel", tf.zeros((3, 2))), (layer, "call", lambda inputs: inputs)]
    with pytest.raises(ZeroDivisionError), scorers.replaced([*other, *other]):
        assert layer.call(3) == 3 and not layer.kernel.numpy().any()
        assert len(layer.weights) == 2 and layer.weights[0] is kernel
        raise ZeroDivisionError
    assert layer.kernel is kernel and all(vars(layer)[name] is held[name] for name in held)
    assert "call" not in vars(layer)


def test_scorers_computing_in(bfloat16):
    layer = dense(3, 2)
    weights = [(layer, n, tf.ones(getattr(layer, n).shape, tf.float64)) for n in ("kernel", "bias")]
    tiny = tf.constant([[2.0**-40, 0.0, 0.0]], tf.float64)
    with scorers.replaced([*weights, *scorers.computing_in(layer, tf.float64)]):
        assert layer.compute_dtype == "float64"
        assert layer(tiny).numpy()[0, 0] == 1 + 2.0**-40
    assert layer.compute_dtype == "bfloat16" and layer(tiny).dtype == tf.bfloat16


def test_scorers_forgetting_losses():
    class Losing(layers.Layer):
        def call(self, x):
            self.add_loss(tf.reduce_sum(x))
            return x

    layer = Losing()
    layer(tf.constant([3.0]))
    graph = tf.function(layer)
    for call in (layer, graph):
        with scorers.replaced(scorers.forgetting_losses(layer)):
            call(tf.constant([5.0]))
        assert [float(loss) for loss in layer.losses] == [3.0]
    layer = Losing()
    layer(keras.Input(()))  # a symbolic one
    (before,) = layer.losses
    with scorers.replaced(scorers.forgetting_losses(layer)):
        assert layer.losses == []
        layer(keras.Input(()))
    assert len(layer.losses) == 1 and layer.losses[0] is before


def test_scorers_taking_inputs_as_they_are():
    x = keras.Input((3,))
    seen = layers.Lambda(lambda inputs: inputs, dtype="float64")
    model = keras.Model(x, seen(x))
    tiny = tf.constant([[1 + 2.0**-40, 0.0, 0.0]], tf.float64)
    assert model(tiny).numpy()[0, 0] == 1
    replacement = scorers.taking_inputs_as_they_are(model, lambda t: tf.cast(t, tf.float64))
    with scorers.replaced([replacement]):
        assert model(tiny).numpy()[0, 0] == 1 + 2.0**-40
        assert model(tiny[:, :, None]).shape == (1, 3)
    assert model(tiny).numpy()[0, 0] == 1


def test_scorers_calls_of():
    layer, x = layers.Dropout(0.5), keras.Input((3,))
    assert scorers.calls_of(layer) == []
    keras.Model(x, layer(layer(x, training=False)))
    assert [call.get("training") for call in scorers.calls_of(layer)] == [False, None]


def test_scorers_made_by():
    last = layers.Dense(2)
    model = functional(layers.Dense(4), last)
    assert scorers.made_by(model.outputs[0]) is last
    assert isinstance(scorers.made_by(model.inputs[0]), layers.InputLayer)


def test_scorers_function_of():
    x = keras.Input((3,))
    operation = scorers.made_by(tf.nn.relu6(x))
    wrapped = layers.Lambda(tf.nn.relu6)
    for layer in (operation, wrapped):
        assert scorers.function_of(layer) == ("function",) and callable(layer.function)
        assert layer(tf.constant([9.0])).numpy() == 6
        with scorers.replaced([(layer, "function", lambda x, **_: x)]):
            assert layer(tf.constant([9.0])).numpy() == 9
    assert scorers.function_of(layers.ReLU(6.0)) == ()


def test_scorers_omit_tracing_warning(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("tensorflow"), "propagate", True)

    def warnings(prepare):
        for n in range(12):  # a function each, as networks are
            function = tf.function(lambda x: x + 1)
            prepare(function)
            function(tf.zeros(n + 1))
        found = [r for r in caplog.records if "retracing" in r.getMessage()]
        caplog.clear()
        return len(found)

    assert warnings(lambda function: None) > 0
    assert warnings(scorers.omit_tracing_warning) == 0


def test_a_replacement_of_what_is_not_there_fails():
    with pytest.raises(AttributeError):
        scorers._replacement(layers.Dense(2), "_gone", None)


@pytest.mark.parametrize("module", [pruning, scorers])
def test_every_function_has_its_contract(module):
    own = {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    }
    room = module.__name__.split(".")[1]
    public = {f"test_{room}_{name}" for name in own if not name.startswith("_")}
    assert len(public) > 5 and not public - set(globals())
    stale = {n for n in globals() if n.startswith(f"test_{room}_")} - public
    assert not stale, "a contract of no function"
    assert all(value.__doc__ for value in own.values())


# --- Nobody else looks inside ----------------------------------------------------------

DOORS = "lth_tf/compat.py", "lth_tf/pruning/inside.py", "lth_tf/scorers/inside.py"
PRIVATE = re.compile(r"_[a-z]\w*")
# Neither promised nor private by their names: what these two modules ask for besides.
UNDOCUMENTED = {
    "__dict__", "__internal__", "call_kwargs", "inbound_nodes", "outbound_nodes",
    "predict_function", "src", "test_function", "train_function", "true_dtype",
}  # fmt: skip
DOCUMENTED = {"_exit"}  # of os
TAKES_NAMES = {"delattr", "getattr", "hasattr", "setattr"}


@functools.cache
def foreign():
    """Private names that objects of TensorFlow and Keras have, of which an own one may be."""
    model, x = functional(layers.Dense(2)), tf.constant(1.0)
    model.compile("adam")
    model.optimizer.build(model.trainable_variables)
    function = tf.function(lambda y: y)
    graph = function.get_concrete_function(x).graph
    there = [
        model, keras.Sequential(), keras.Model(), Holder(), dense(3, 2),
        layers.Dense(2, input_shape=(3,)), layers.BatchNormalization(), layers.LSTM(2),
        model.outputs[0], model.optimizer, optimizers.legacy.Adam(),
        keras.mixed_precision.LossScaleOptimizer(optimizers.Adam()), keras.callbacks.Callback(),
        keras.callbacks.CallbackList(), keras.metrics.Mean(), x, tf.Variable(1.0), function, graph,
        graph.get_operations()[0], tf.Module(), one_replica(), one_replica().extended,
        tf.distribute.MultiWorkerMirroredStrategy, tf.distribute.get_strategy().extended,
        tf.data.Dataset.range(2),
    ]  # fmt: skip
    return {name for thing in there for name in dir(thing) if PRIVATE.fullmatch(name)}


def defined(tree):
    """Private names that a file or a class defines: functions, classes, variables, attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                found.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("set_untracked"):
            found |= {a.value for a in node.args[1:2] if isinstance(a, ast.Constant)}
    return {name for name in found if PRIVATE.fullmatch(name)}


def looks_inside(tree, own):
    """(line, name) of each private name in a file that is not the project's.

    A name of the project's (`own`) that a foreign object has as well is the project's where
    it is asked of `self`, in a class that defines it and that inherits from no foreign one.
    """
    found = []

    def visit(node, mine):
        names = []
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base).split("[")[0] for base in node.bases}
            mine = defined(node) if bases <= {"NamedTuple", "Protocol", "RuntimeError"} else set()
        elif isinstance(node, ast.Attribute):
            asked = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not (asked and node.attr in mine):
                names.append(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in TAKES_NAMES:
            names += [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            names.append(str(node.slice.value))
        elif isinstance(node, ast.Constant) and node.value in foreign():
            names.append(node.value)
        for name in names:
            private = PRIVATE.fullmatch(name) and (name not in own or name in foreign())
            if (private and name not in DOCUMENTED) or name in UNDOCUMENTED:
                found.append((node.lineno, name))
        for child in ast.iter_child_nodes(node):
            visit(child, mine)

    visit(tree, set())
    return sorted(set(found))


def trees(root):
    """Path -> syntax tree of each file of the package."""
    files = sorted((root / "lth_tf").rglob("*.py"))
    return {str(path.relative_to(root)): ast.parse(path.read_text()) for path in files}


def test_nobody_else_looks_inside():
    files = trees(ROOT)
    assert set(DOORS) < set(files)
    own = set().union(*map(defined, files.values()))
    for path, tree in files.items():
        found = looks_inside(tree, own)
        assert not found or path in DOORS, f"{path}: {found}; ask through pruning/inside.py"


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("layer._flatten_layers()", ["_flatten_layers"]),
        ("[x for y in z for x in y.layers[0]._losses]", ["_losses"]),
        ("getattr(optimizer, '_index_dict', {})", ["_index_dict"]),
        ("hasattr(variable, 'true_dtype')", ["true_dtype"]),
        ("fixed.append((layer, '_dtype_policy', policy))", ["_dtype_policy"]),
        ("vars(layer)['_anything']", ["_anything"]),
        ("layer.__dict__['x'] = 1", ["__dict__"]),
        ("keras.src.engine", ["src"]),
        ("class A(keras.layers.Layer):\n def f(self):\n  self._losses = []", ["_losses"]),
        ("class A(B):\n def f(self):\n  return self._unknown", ["_unknown"]),
        ("class A:\n def f(self):\n  self._losses = self._mine()\n def _mine(self): 0", []),
        ("class A:\n def _losses(self): 0\ndef f(a, layer):\n  return layer._losses", ["_losses"]),
        ("class A(Layer):\n def f(self):\n  self._made = 1\ndef f(a):\n  return a._made", []),
        ("def f(a):\n  return a._known, a['_known'], getattr(a, '_known')", []),
        ("os._exit(1); x._replace", ["_replace"]),
        ("name + '_dropout', __name__, self.__init__", []),
    ],
)
def test_what_looks_inside_is_found(code, names):
    tree = ast.parse(code)
    assert [name for _, name in looks_inside(tree, defined(tree) | {"_known"})] == names


ORDER = (
    "inside", "slots", "walls", "hosts", "masked", "names", "selection", "rewrap", "models",
    "__init__",
)  # fmt: skip


def test_modules_of_pruning_import_those_before_them():
    found = trees(ROOT)
    for at, name in enumerate(ORDER):
        for node in ast.walk(found.pop(f"lth_tf/pruning/{name}.py")):
            if isinstance(node, ast.ImportFrom) and node.module == "lth_tf.pruning":
                assert {alias.name for alias in node.names} <= set(ORDER[:at]), name
            elif isinstance(node, ast.ImportFrom) and node.module.startswith("lth_tf.pruning."):
                assert node.module.split(".")[2] in ORDER[:at], name
    assert not any(path.startswith("lth_tf/pruning/") for path in found)



class Deciding(layers.Layer):
    """A layer that only AutoGraph can put into a graph."""

    def build(self, shape):
        self.kernel = self.add_weight("kernel", [shape[-1], 2], initializer="ones")

    def call(self, x):
        y = x @ self.kernel
        if tf.reduce_sum(y) > 0:
            y = -y
        return y


def halved(x):
    if tf.reduce_sum(x) > 0:
        x = x / 2
    return x


def test_pruning_autographed():
    with pytest.raises(tf.errors.OperatorNotAllowedInGraphError):
        tf.function(halved, autograph=False)(tf.ones([1]))
    graph = tf.function(lambda x: pruning.autographed(halved)(x), autograph=False)
    assert graph(tf.ones([1])).numpy().tolist() == [0.5]
    assert pruning.autographed(pruning.sublayers) is pruning.sublayers  # of this package


def test_pruning_layers_autographed():
    layer = Deciding()

    def called(x):
        with pruning.layers_autographed():
            return layer(x)

    with pytest.raises(tf.errors.OperatorNotAllowedInGraphError):
        tf.function(lambda x: layer(x), autograph=False)(tf.ones([1, 3]))
    assert np.all(tf.function(called, autograph=False)(tf.ones([1, 3])).numpy() == -3)


@pytest.mark.parametrize("autograph", [True, False])
def test_pruning_call_of(autograph):
    model = prune(keras.Sequential([keras.Input([3]), Deciding()]))  # MaskedLayer asks it

    def called(x):
        with pruning.layers_autographed():
            return model(x)

    assert np.all(tf.function(called, autograph=autograph)(tf.ones([1, 3])).numpy() == -3)
    plain = layers.Dense(1)
    assert pruning.call_of(plain) == plain.call


def test_pruning_unread():
    def call(x):
        return halved(x)

    autograph = tf.__internal__.autograph
    marked = pruning.unread(call)
    assert autograph.tf_convert(marked, autograph.control_status_ctx()) is marked is call


def test_pruning_require_layer():
    keras_3 = pytest.importorskip("keras")
    for one in (layers.Dense(1), keras.Sequential([layers.Dense(1)])):
        pruning.require_layer(one)
    with pytest.raises(UserError, match="Keras 3 model; lth_tf prunes tf_keras models"):
        pruning.require_layer(keras_3.layers.Dense(1))
    with pytest.raises(UserError, match="takes a tf_keras model, not str"):
        pruning.require_layer("model")


def test_pruning_is_chain():
    chain = functional(layers.Dense(2), layers.ReLU())
    assert pruning.is_chain(chain) and pruning.is_chain(prune(chain))
    assert pruning.is_chain(keras.Sequential([keras.Input([3]), layers.Dense(1)]))
    x = keras.Input([3])
    y = layers.Dense(3)(x)
    assert not pruning.is_chain(keras.Model(x, layers.Add()([x, y])))
    assert not pruning.is_chain(keras.Model(x, [y, layers.ReLU()(y)]).layers[1])
    twice = layers.Dense(3)
    assert not pruning.is_chain(keras.Model(x, twice(twice(x))))


def test_pruning_replace_train_function():
    seen = []

    class Between(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            def step(iterator):
                seen.append(self.model.optimizer.iterations.numpy())
                return before(iterator)

            before = pruning.replace_train_function(self.model, step)
            self.before = before

        def on_train_end(self, logs=None):
            pruning.replace_train_function(self.model, self.before)

    model = functional(layers.Dense(2))
    model.compile("sgd", "mse")
    size = model.input_shape[-1]
    model.fit(np.ones([6, size]), np.ones([6, 2]), batch_size=2, verbose=0, callbacks=[Between()])
    assert seen == [0, 1, 2]
    model.fit(np.ones([2, size]), np.ones([2, 2]), verbose=0)
    assert len(seen) == 3


def test_pruning_steps_in_a_call():
    model = functional(layers.Dense(2))
    assert pruning.steps_in_a_call(model) == 1
    model.compile("sgd", "mse", steps_per_execution=3)
    assert pruning.steps_in_a_call(model) == 3


def test_pruning_calls_of():
    x = keras.Input([3])
    y = layers.Dense(4, name="y")(x)
    z = layers.Dense(4, name="z")(x)
    model = keras.Model(x, [layers.Add(name="sum")([z, y]), y])
    found = [(c.name, [f.name for f in fs], s) for c, fs, s in pruning.calls_of(model)]
    (first, *_), (last, *_) = found[0], found[-1]
    assert sorted(found[1:-1]) == [("y", [first], (None, 4)), ("z", [first], (None, 4))]
    assert found[0][1:] == ([], (None, 3)) and (last, found[-1][1]) == ("sum", ["z", "y"])
    chain = keras.Sequential([keras.Input([3]), layers.Dense(2, name="d"), layers.ReLU(name="r")])
    assert [(c.name, [f.name for f in fs]) for c, fs, _ in pruning.calls_of(chain)][1:] == [
        ("d", [chain.input_names[0]]), ("r", ["d"]),
    ]  # fmt: skip
    same = layers.Dense(3)
    assert [c for c, _, _ in pruning.calls_of(keras.Model(x, same(same(x))))][1:] == [same, same]


@pytest.mark.parametrize("timed", [True, False])
def test_pruning_untimed(timed, monkeypatch):
    class Slow(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            time.sleep(0.002)

    said = []
    monkeypatch.setattr(logging.Logger, "warning", lambda self, text, *more: said.append(text))
    hooks = keras.callbacks.CallbackList([Slow()], model=functional(layers.Dense(2)))
    hooks = hooks if timed else pruning.untimed(hooks)
    for batch in range(9):
        hooks.on_train_batch_begin(batch)
        hooks.on_train_batch_end(batch)
    assert any("is slow compared to the batch time" in text for text in said) == timed
