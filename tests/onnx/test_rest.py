"""What the engine does not take runs in ONNX Runtime, in as few parts as possible, and the whole is the graph."""

import copy
import pickle

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_models import FLOAT, model, node, runtime, sparse_integers
from onnxruntime import InferenceSession
from oracle import assert_exact, small_integers

from lt4rec_sparse import SparseLinear, SparseMLP, from_onnx, report
from lt4rec_sparse.errors import InputError
from lt4rec_sparse.onnx import session
from lt4rec_sparse.onnx.graph import Graph
from lt4rec_sparse.onnx.source import Source

W, V = sparse_integers(8, 8, 1), sparse_integers(8, 8, 2)
X = small_integers(5, 8, generator=torch.Generator().manual_seed(0))
ROWS = {"x": ["batch", 8]}


def of(nodes, outputs=("y",), inputs=None, **constants):
    return model(nodes, {"w": W, "v": V, **constants}, inputs or ROWS, list(outputs))


def assert_same(original, *inputs, parts=None, calls=None):
    """Fail unless a module computes what the graph does, exactly."""
    module = from_onnx(original)
    found = module(*inputs)
    wanted = runtime(original, *inputs)
    found = (found,) if isinstance(found, torch.Tensor) else found
    assert len(found) == len(wanted)
    for y, of_runtime in zip(found, wanted, strict=True):
        assert_exact(y, of_runtime)
    if parts is not None:
        assert (module.parts, len(module.calls)) == (parts, calls)
    return module


def test_a_residual():
    assert_same(of([node("MatMul", "x w", "a"), node("Relu", "a", "b"), node("Add", "b x", "y")]), X, parts=1, calls=1)


def test_a_shared_weight():
    nodes = [node("MatMul", "x w", "a"), node("MatMul", "a w", "y")]
    assert isinstance(from_onnx(of(nodes)), SparseMLP)
    assert_exact(from_onnx(of(nodes))(X), runtime(of(nodes), X)[0])


def test_a_value_that_several_read_ends_a_chain():
    nodes = [node("MatMul", "x w", "a"), *(node("MatMul", f"a {k}", k * 2) for k in "wv"), node("Add", "ww vv", "y")]
    assert_same(of(nodes), X, parts=1, calls=3)


def test_an_output_in_the_middle_ends_a_chain():
    nodes = [node("MatMul", "x w", "a"), node("Relu", "a", "b"), node("MatMul", "b v", "y")]
    # The sum before the Relu is wanted, so that the engine cannot take the Relu.
    assert_same(of(nodes, ["a", "y"]), X, parts=1, calls=2)
    module = assert_same(of(nodes, ["b", "y"]), X, parts=0, calls=2)
    assert module.output_names == ("b", "y")


def test_parts_are_as_few_as_calls_allow():
    """Two branches of different depth, a long one with three calls in between: parts before, between and after."""
    nodes = [
        node("Abs", "x", "p"),
        node("MatMul", "p w", "q"),
        node("Abs", "q", "r"),
        node("MatMul", "r v", "s"),
        node("Neg", "x", "t"),
        node("MatMul", "t v", "u"),
        node("Abs", "u", "o"),
        node("Add", "s o", "y"),
    ]
    module = assert_same(of(nodes), X, parts=3, calls=3)
    assert "parts in ONNX Runtime: 3" in repr(module)


def test_calls_behind_calls_take_no_part_between():
    dense = np.ones((8, 64), np.float32)
    nodes = [
        node("MatMul", "x w", "a"),
        node("MatMul", "a v", "b"),
        node("MatMul", "a w", "c"),
        node("MatMul", "b d", "y"),
        node("MatMul", "c d", "z"),
    ]
    assert_same(of(nodes, ["y", "z"], d=dense), X, parts=1, calls=3)


def test_constants_go_to_every_part_that_reads_them():
    nodes = [
        node("Identity", "c", "k"),
        node("Add", "x k", "a"),
        node("MatMul", "a w", "b"),
        node("Abs", "b", "e"),
        node("Mul", "e k", "y"),
    ]
    module = assert_same(of(nodes, c=np.full((1, 8), 2, np.float32)), X, parts=2, calls=1)
    assert all(step.inputs in (("x",), ("b",)) for step in module._steps if hasattr(step, "model"))


def test_unused_inputs_and_dead_nodes():
    nodes = [node("MatMul", "x w", "a"), node("MatMul", "x v", "dead"), node("Relu", "a", "y")]
    module = assert_same(of(nodes, inputs={**ROWS, "unused": [3]}), X, torch.zeros(3), parts=0, calls=1)
    assert module.input_names == ("x", "unused")


def test_an_input_that_is_an_output():
    original = of([node("MatMul", "x w", "y")], ["y", "x"])
    assert_same(original, X, parts=0, calls=1)


def test_scalars_and_integers_go_through():
    nodes = [node("MatMul", "x w", "a"), node("Gather", "a i", "y", axis=1), node("Shape", "a", "n")]
    original = of(nodes, ["y"], inputs=ROWS)
    original.graph.input.append(helper.make_tensor_value_info("i", TensorProto.INT64, ["n"]))
    original.graph.output.append(helper.make_tensor_value_info("n", TensorProto.INT64, [2]))
    original.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", FLOAT, ["a", "b"]))
    module = from_onnx(original)
    i = torch.tensor([7, 0, 3])
    for found, wanted in zip(module(X, i), runtime(original, X, i), strict=True):
        assert_exact(found, wanted)
    assert_exact(module(i=i, x=X)[0], module(X, i)[0])


def test_sequences_strings_and_scalars_go_from_part_to_part():
    nodes = [
        node("SplitToSequence", "x", "pieces", axis=1),
        node("ReduceSum", "x", "total", keepdims=0),
        node("Cast", "x", "text", to=TensorProto.STRING),
        node("Abs", "x", "p"),
        node("MatMul", "p w", "a"),
        node("Abs", "a", "b"),
        node("SequenceAt", "pieces one", "piece"),
        node("Cast", "text", "numbers", to=FLOAT),
        node("Add", "b piece", "c"),
        node("Add", "c numbers", "d"),
        node("Mul", "d total", "y"),
    ]
    module = assert_same(of(nodes, ["y", "total"], one=np.array(1)), X, parts=2, calls=1)
    assert module(X)[1].shape == ()


def test_a_value_that_numpy_lacks_does_not_go_from_part_to_part():
    nodes = [
        node("Cast", "x", "h", to=TensorProto.BFLOAT16),
        node("Abs", "x", "p"),
        node("MatMul", "p w", "a"),
        node("Abs", "a", "b"),
        node("Cast", "b", "c", to=TensorProto.BFLOAT16),
        node("Concat", "c h", "both", axis=1),
        node("Cast", "both", "y", to=FLOAT),
    ]
    with pytest.raises(InputError, match="value 'h': got BFLOAT16 between two parts, wanted what NumPy has"):
        from_onnx(of(nodes))


def branches(value: str) -> onnx.NodeProto:
    """Return an If whose branches read a value from outside, and a weight."""
    graphs = {}
    for name, operator in (("then_branch", "Relu"), ("else_branch", "Neg")):
        output = helper.make_tensor_value_info(f"{name}_y", FLOAT, None)
        inner = [node("MatMul", f"{value} v", f"{name}_a"), node(operator, f"{name}_a", f"{name}_y")]
        graphs[name] = helper.make_graph(inner, name, [], [output])
    return helper.make_node("If", ["flag"], ["c"], name="if", **graphs)


@pytest.mark.parametrize("flag", [True, False])
def test_subgraphs_read_what_is_around_them(flag):
    nodes = [
        node("MatMul", "x w", "a"),
        node("ReduceSum", "x", "s", keepdims=0),
        node("Less", "s limit", "flag"),
        branches("a"),
        node("Relu", "a", "b"),
        node("MatMul", "b v", "d"),
        node("Add", "c d", "y"),
    ]
    original = of(nodes, limit=np.float32(1e6 if flag else -1e6))
    # The If reads `a`, so that the engine cannot take the Relu, and `v` is constant in both.
    module = assert_same(original, X, calls=2, parts=2)
    assert [type(call) for call in module.calls.values()] == [SparseLinear, SparseLinear]


def test_a_loop_reads_what_a_call_makes():
    body = helper.make_graph(
        [node("Add", "h a", "h2"), node("Identity", "go", "go2")],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("h", FLOAT, None),
        ],
        [helper.make_tensor_value_info("go2", TensorProto.BOOL, []), helper.make_tensor_value_info("h2", FLOAT, None)],
    )
    nodes = [node("MatMul", "x w", "a"), helper.make_node("Loop", ["n", "", "x"], ["y"], name="loop", body=body)]
    assert_same(of(nodes, n=np.array(3)), X, parts=1, calls=1)


def test_values_of_other_domains_have_their_type_from_onnx_runtime():
    nodes = [
        helper.make_node("FusedMatMul", ["x", "x"], ["m"], domain="com.microsoft", transA=1),
        node("MatMul", "m w", "a"),
        node("Abs", "a", "b"),
        node("MatMul", "b v", "c"),
        node("Add", "c m", "y"),
    ]
    original = of(nodes)
    original.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", FLOAT, [8, 8]))
    assert_same(original, X, parts=3, calls=2)


WIDTH = 6


@st.composite
def graphs(draw):
    """Draw graphs of layers, sums and activations over integers in which any value may be read again."""
    values, nodes, constants = ["x"], [], {}
    for i in range(draw(st.integers(1, 8))):
        read = draw(st.sampled_from(values))
        kind = draw(st.sampled_from(["sparse", "sparse", "dense", "Relu", "Add", "Identity", "bias", "Neg", "Clip"]))
        name, constant = f"v{i}", f"c{i}"
        if kind in ("sparse", "dense"):
            rng = np.random.default_rng(draw(st.integers(0, 99)))
            weight = rng.choice((-1, 1), (WIDTH, WIDTH)) * (rng.random((WIDTH, WIDTH)) < (kind == "dense") + 0.3)
            constants[constant] = weight.astype(np.float32)
            nodes.append(node(draw(st.sampled_from(["MatMul", "Gemm"])), f"{read} {constant}", name))
        elif kind == "Add":
            nodes.append(node("Add", f"{read} {draw(st.sampled_from(values))}", name))
        elif kind == "bias":
            constants[constant] = np.arange(WIDTH, dtype=np.float32) - 2
            nodes.append(node("Add", f"{read} {constant}", name))
        elif kind == "Clip":
            constants[constant] = np.float32(-2)
            nodes.append(node("Clip", f"{read} {constant}", name))
        else:
            nodes.append(node(kind, read, name))
        values.append(name)
    outputs = draw(st.lists(st.sampled_from(values[1:]), min_size=1, max_size=3, unique=True))
    return model(nodes, constants, {"x": ["batch", WIDTH]}, outputs)


@given(graphs(), st.integers(0, 4))
def test_any_graph_is_computed_as_onnx_runtime_does(original, rows):
    x = small_integers(rows, WIDTH, generator=torch.Generator().manual_seed(rows))
    try:
        module = from_onnx(original)
    except InputError as error:
        assert "without pruned linear layers" in str(error)
        return
    found = module(x)
    found = (found,) if isinstance(found, torch.Tensor) else found
    for y, wanted in zip(found, runtime(original, x), strict=True):
        assert_exact(y, wanted)


def with_rest() -> onnx.ModelProto:
    return of(
        [node("MatMul", "x w", "a"), node("Softmax", "a", "s"), node("MatMul", "s v", "b"), node("Add", "b x", "y")]
    )


def test_copies_compute_the_same():
    module = from_onnx(with_rest())
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_exact(copied(X), module(X))
        assert copied.parts == module.parts == 2
        assert not copied.training


def test_a_state_carries_everything_or_is_refused():
    other_constants = {"w": W + 0, "v": sparse_integers(8, 8, 9), "k": np.full((1, 8), 3, np.float32)}
    nodes = [node("MatMul", "x w", "a"), node("Mul", "a k", "s"), node("MatMul", "s v", "y")]
    first = from_onnx(of(nodes, k=np.full((1, 8), 2, np.float32)))
    second = from_onnx(model(nodes, other_constants, ROWS, ["y"]))
    wanted = second(X)
    assert not torch.equal(first(X), wanted)
    first.load_state_dict(second.state_dict())
    assert_exact(first(X), wanted)
    third = from_onnx(
        of([node("MatMul", "x w", "a"), node("Div", "a k", "s"), node("MatMul", "s v", "y")], k=np.float32(2))
    )
    with pytest.raises(ValueError, match="got parts of another graph, wanted the same nodes"):
        first.load_state_dict(third.state_dict())


def test_report_tells_of_each_call():
    found = report(from_onnx(with_rest()), X).entries
    assert [entry.name for entry in found] == ["calls.0 /a", "calls.1 /b"]
    assert all(entry.format == "weights" and entry.rows == 5 and entry.microseconds > 0 for entry in found)


def test_wrong_inputs_are_refused():
    module = from_onnx(with_rest())
    for inputs, named, error, said in (
        ((), {}, TypeError, "x: got nothing, wanted a tensor"),
        ((X, X), {}, TypeError, "inputs: got 2, wanted x"),
        ((X,), {"x": X}, TypeError, "inputs: got 'x', wanted each input once: x"),
        ((), {"z": X}, TypeError, "inputs: got 'z', wanted x"),
        ((X.numpy(),), {}, TypeError, "x: got a ndarray, wanted a tensor"),
        ((X.double(),), {}, ValueError, r"x: got torch\.float64 on cpu, wanted torch\.float32 on cpu"),
        ((X.to("meta"),), {}, ValueError, r"x: got torch\.float32 on meta, wanted"),
        ((X[:, :7],), {}, ValueError, r"x: got shape \(5, 7\), wanted \[any, 8\]"),
        ((X[0],), {}, ValueError, r"x: got shape \(8,\), wanted \[any, 8\]"),
    ):
        with pytest.raises(error, match=said):
            module(*inputs, **named)


def test_what_onnx_runtime_cannot_compute_is_one_error():
    original = of([node("MatMul", "x w", "a"), node("Reshape", "a shape", "y")], shape=np.array([3, 8]))
    module = from_onnx(original)
    assert module(X[:3]).shape == (3, 8)
    with pytest.raises(InputError, match=r"^inputs: got some that the graph does not compute") as caught:
        module(X)
    assert "\n" not in str(caught.value)


def test_gradients_and_strides_do_not_matter():
    module = from_onnx(with_rest())
    wanted = module(X)
    x = X.T.contiguous().T.requires_grad_()
    y = module(x)
    assert_exact(y, wanted)
    assert not y.requires_grad


def test_a_result_outlives_the_next_call():
    module = from_onnx(with_rest())
    first = module(X)
    kept = first.clone()
    for _ in range(3):
        module(X + 1)
    assert_exact(first, kept)


def pair(value: str, output: str, k: str) -> list[onnx.NodeProto]:
    return [
        node("QuantizeLinear", f"{value} s{k} z{k}", f"{output}_q"),
        node("DequantizeLinear", f"{output}_q s{k} z{k}", output),
    ]


def quantised(dtype=np.uint8, behind=()) -> onnx.ModelProto:
    nodes = [
        *pair("x", "xq", "0"),
        node("MatMul", "xq w", "a"),
        node("Relu", "a", "b"),
        *pair("b", "bq", "1"),
        node("MatMul", "bq v", "y" if not behind else "c"),
        *behind,
    ]
    zero = 128 if dtype == np.uint8 else 0
    constants = {"s0": np.float32(1), "z0": dtype(zero), "s1": np.float32(1), "z1": dtype(zero - 128)}
    if dtype == np.int8:
        constants["z1"] = dtype(-128)
    return of(nodes, **constants)


def test_quantised_activations_are_computed_as_they_are():
    assert_same(quantised(), X, parts=2, calls=2)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_for_int8_a_file_brings_its_calibration(dtype):
    module = from_onnx(quantised(dtype), "int8")
    assert isinstance(module, SparseMLP)
    assert module.precision == "int8"
    assert module.network.quantization == {"task": ((1.0, 128), (1.0, 0))}
    plain = SparseMLP(module.network).to_precision("int8")
    assert_exact(module(X), plain(X))
    behind = [*pair("c", "cq", "0"), node("Abs", "cq", "y")]
    followed = from_onnx(quantised(dtype, behind), "int8")
    assert (followed.parts, len(followed.calls)) == (1, 1)
    assert_exact(followed(X), plain(X).round().clamp(-128, 127).abs())


def test_int8_of_a_layer_whose_input_is_not_quantised_is_refused():
    nodes = [*pair("x", "xq", "0"), node("MatMul", "xq w", "a"), node("MatMul", "a v", "y")]
    original = of(nodes, s0=np.float32(1), z0=np.uint8(128))
    with pytest.raises(InputError, match="MatMul '/y': got an input in float32, wanted one that is quantised"):
        from_onnx(original, "int8")


def test_bf16():
    module = from_onnx(with_rest(), "bf16")
    assert {call.precision for call in module.calls.values()} == {"bf16"}


def test_weights_of_two_quantised_readers_share_one_pair():
    """The input of both layers is quantised once, and int8 takes it before that."""
    nodes = [
        *pair("x", "xq", "0"),
        node("MatMul", "xq w", "a"),
        node("MatMul", "xq v", "b"),
        node("Add", "a b", "y"),
    ]
    original = of(nodes, s0=np.float32(1), z0=np.uint8(128))
    module = from_onnx(original, "int8")
    assert (module.parts, len(module.calls)) == (1, 2)
    assert_same(original, X, parts=2, calls=2)
    assert numpy_helper.to_array(original.graph.initializer[0]).shape == (8, 8)


def normed(before: str, behind=()) -> onnx.ModelProto:
    """Return a norm of a value, which is then quantised for a layer; the norm leaves another range than it reads."""
    nodes = [
        node("BatchNormalization", f"{before} scale shift mean variance", "n", epsilon=0.0),
        *pair("n", "nq", "1"),
        node("MatMul", "nq v", "y"),
    ]
    norm = {"scale": np.full(8, 4), "shift": np.arange(8) - 3, "mean": np.zeros(8), "variance": np.ones(8)}
    constants = {name: np.asarray(value, np.float32) for name, value in norm.items()}
    constants |= {"s0": np.float32(1), "z0": np.uint8(128), "s1": np.float32(2), "z1": np.uint8(128)}
    return of([*behind, *nodes], **constants)


@pytest.mark.parametrize("place", ["first", "behind an activation", "behind a layer"])
def test_int8_quantises_what_a_norm_leaves(place):
    layer = [*pair("x", "xq", "0"), node("MatMul", "xq w", "a"), node("Relu", "a", "b")]
    behind = {"first": [], "behind an activation": layer, "behind a layer": layer[:-1]}[place]
    original = normed({"first": "x", "behind an activation": "b", "behind a layer": "a"}[place], behind)
    module = from_onnx(original, "int8")
    if place == "behind a layer":
        assert isinstance(module, SparseMLP)
        assert module.network.quantization == {"task": ((1.0, 128), (2.0, 128))}
        assert torch.equal(module.network.layer(0, "task").weight, torch.tensor(4 * W.T))
        return
    calls = list(module.calls.values())
    assert torch.equal(calls[-1].weight, torch.tensor(V.T)), "no norm is folded into what is quantised before it"
    assert calls[-1].network.quantization == {"task": ((2.0, 128),)}
    entering = X if place == "first" else calls[0](X)
    assert_exact(module(X), calls[-1](4 * entering + torch.arange(8) - 3))


@pytest.mark.parametrize("scale", [0.0, np.nan, np.inf, -1.0, 1e-39])
def test_int8_by_a_scale_that_is_none_is_refused(scale):
    nodes = [*pair("x", "xq", "0"), node("MatMul", "xq w", "y")]
    original = of(nodes, s0=np.float32(scale), z0=np.uint8(128))
    with pytest.raises(InputError, match=r"^model: MatMul '/y': got scale .*, wanted above 0 and finite in float32"):
        from_onnx(original, "int8")


def test_shapes_that_a_file_states_of_values_within_may_be_wrong():
    original = of(
        [node("MatMul", "x w", "a"), node("Softmax", "a", "s"), node("MatMul", "s v", "b"), node("Add", "b x", "y")]
    )
    for name, shape in (("a", [5, 99]), ("b", [3, 8]), ("s", [5])):
        original.graph.value_info.append(helper.make_tensor_value_info(name, FLOAT, shape))
    assert_same(original, X, parts=2, calls=2)


def test_a_rank_that_a_file_states_wrongly_joins_nothing():
    """A norm of `[batch, 8]` is folded, but this one is of `[batch, 8, 8]`, whatever is stated."""
    nodes = [node("MatMul", "x w", "a"), node("BatchNormalization", "a s t m v1", "y")]
    constants = {name: np.arange(1, 9, dtype=np.float32) for name in ("s", "t", "m", "v1")}
    original = of(nodes, inputs={"x": ["batch", 8, 8]}, **constants)
    original.graph.value_info.append(helper.make_tensor_value_info("a", FLOAT, ["batch", 8]))
    module, x = from_onnx(original), small_integers(2, 8, 8, generator=torch.Generator().manual_seed(0))
    assert module.parts == 1
    torch.testing.assert_close(module(x), runtime(original, x)[0])


def test_autocast_changes_nothing():
    module = from_onnx(with_rest())
    wanted = module(X)
    with torch.autocast("cpu", torch.bfloat16):
        assert_exact(module(X), wanted)


def constant_operands() -> dict[str, list[onnx.NodeProto]]:
    """Return nodes that read a constant which is no tensor of NumPy, behind `a`."""
    return {
        "a sequence": [
            node("SequenceConstruct", "k k", "list"),
            node("SequenceInsert", "list a", "longer"),
            node("SequenceAt", "longer two", "y"),
        ],
        "bfloat16": [
            node("Cast", "k", "half", to=TensorProto.BFLOAT16),
            node("Cast", "a", "b", to=TensorProto.BFLOAT16),
            node("Concat", "b half", "c", axis=0),
            node("Cast", "c", "y", to=FLOAT),
        ],
        "bfloat16, added": [
            node("Cast", "k", "half", to=TensorProto.BFLOAT16),
            node("Cast", "half", "k2", to=FLOAT),
            node("Mul", "a k2", "y"),
        ],
    }


@pytest.mark.parametrize("name", constant_operands())
def test_constants_that_numpy_lacks_stay_with_onnx_runtime(name):
    nodes = [node("MatMul", "x w", "a"), *constant_operands()[name]]
    original = of(nodes, k=np.ones((1, 8), np.float32), two=np.array(2))
    assert_same(original, X, parts=1, calls=1)


def test_a_constant_of_bfloat16_is_none_for_numpy():
    nodes = [
        node("Cast", "k", "half", to=TensorProto.BFLOAT16),
        node("Cast", "half", "k2", to=FLOAT),
        node("MatMul", "x w", "a"),
        node("Mul", "a k2", "y"),
    ]
    graph = Graph(Source(of(nodes, k=np.float32(1))))
    assert graph.constant("half") is None
    assert graph.constant("k2") == 1.0


def test_each_session_is_made_once(monkeypatch):
    made = []

    def counted(*arguments):
        made.append(1)
        return InferenceSession(*arguments)

    monkeypatch.setattr(session, "InferenceSession", counted)
    module = from_onnx(with_rest())
    assert len(made) == module.parts == 2
