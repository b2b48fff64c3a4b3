"""However a file stores a weight it is read exactly, and a file that cannot be read is refused by one line."""

import copy
import pickle
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_models import FLOAT, model, node, runtime, sparse_floats, sparse_integers
from oracle import assert_exact, small_integers

from lt4rec_sparse import SparseLinear, from_onnx
from lt4rec_sparse.errors import InputError

WEIGHT = sparse_integers(12, 16)  # as MatMul reads it: [in_features, out_features]
X = small_integers(5, 12, generator=torch.Generator().manual_seed(0))
f32 = np.float32


def of_constants(*nodes, opset=20, sparse=(), **constants):
    """Return a model of one product by `w`, which the nodes make of the constants."""
    return model([*nodes, node("MatMul", "x w", "y")], constants, {"x": ["batch", 12]}, ["y"], opset, sparse)


def assert_reads(original, weight=WEIGHT):
    module = from_onnx(original)
    assert type(module) is SparseLinear
    assert torch.equal(module.weight, torch.tensor(weight.T))
    return module


def stored(indices: np.ndarray, values: np.ndarray, name: str = "w", shape=(12, 16)) -> onnx.SparseTensorProto:
    return helper.make_sparse_tensor(
        numpy_helper.from_array(values, name), numpy_helper.from_array(indices, f"{name} places"), list(shape)
    )


def test_initializers_and_constants():
    assert_reads(of_constants(w=WEIGHT))
    tensor = helper.make_tensor("", FLOAT, WEIGHT.shape, WEIGHT.flatten())
    assert_reads(of_constants(node("Constant", "", "w", value=tensor)))
    assert_reads(of_constants(node("Identity", "i", "w"), i=WEIGHT))
    assert_reads(of_constants(node("Transpose", "t", "w", perm=[1, 0]), t=np.ascontiguousarray(WEIGHT.T)))
    assert_reads(of_constants(node("Mul", "d m", "w"), d=WEIGHT + (WEIGHT == 0), m=(WEIGHT != 0).astype(f32)))
    assert_reads(of_constants(node("Cast", "h", "w", to=FLOAT), h=WEIGHT.astype(np.float16)))


def test_a_weight_that_is_an_input_too_is_a_constant():
    original = of_constants(w=WEIGHT)
    original.graph.input.append(helper.make_tensor_value_info("w", FLOAT, WEIGHT.shape))
    assert_reads(original)


def test_a_weight_computed_from_constants_of_several_kinds():
    shape = node("Constant", "", "s", value_ints=[12, 16])
    assert_reads(of_constants(shape, node("Reshape", "flat s", "w"), flat=WEIGHT.flatten()))


@pytest.mark.parametrize("is_linear", [False, True])
@pytest.mark.parametrize("is_constant", [False, True])
def test_what_a_sparse_tensor_stores_is_kept_though_it_is_zero(is_linear, is_constant):
    places = np.argwhere(WEIGHT)
    values = WEIGHT[tuple(places.T)]
    values[3] = 0.0
    weight = np.zeros_like(WEIGHT)
    weight[tuple(places.T)] = values
    if is_linear:
        places = np.ravel_multi_index(tuple(places.T), WEIGHT.shape)
    tensor = stored(places, values)
    original = (
        of_constants(node("Constant", "", "w", sparse_value=tensor)) if is_constant else of_constants(sparse=[tensor])
    )
    module = assert_reads(original, weight)
    assert torch.equal(module.network.mask(0, "task"), torch.tensor(WEIGHT.T != 0))
    assert_exact(module(X), X @ torch.tensor(weight))


@pytest.mark.parametrize(
    "places",
    [np.array([0, 192]), np.array([-1, 4]), np.array([7, 7]), np.array([0]), np.array([[0, 16], [1, 1]])],
    ids=["beyond", "below", "twice", "too few", "column beyond"],
)
def test_a_sparse_tensor_with_wrong_places_is_refused(places):
    with pytest.raises(InputError, match=r"^model: w: got indices .* wanted one place within \(12, 16\) for each"):
        from_onnx(of_constants(sparse=[stored(places, np.ones(2, f32))]))


def of_sparse(is_constant: bool, change) -> onnx.ModelProto:
    tensor = stored(np.array([0, 5]), np.ones(2, f32))
    change(tensor)
    if is_constant:
        return of_constants(node("Constant", "", "w", sparse_value=tensor))
    return of_constants(sparse=[tensor])


def set_dims(*dims):
    def change(tensor):
        tensor.dims[:] = dims

    return change


DAMAGES = {
    "indices of another dtype": (
        lambda t: t.indices.CopyFrom(numpy_helper.from_array(np.array([0.0, 5.0]))),
        r"got indices DOUBLE \(2,\), wanted INT64 \[stored\] or \[stored, dimensions\]",
    ),
    "indices of three dimensions": (
        lambda t: t.indices.CopyFrom(numpy_helper.from_array(np.zeros((2, 1, 1), np.int64))),
        r"got indices INT64 \(2, 1, 1\), wanted",
    ),
    "values of two dimensions": (
        lambda t: t.values.CopyFrom(numpy_helper.from_array(np.ones((2, 1), f32), "w")),
        r"got values of shape \(2, 1\), wanted \[stored\]",
    ),
    "a negative size": (set_dims(-12, 16), r"got a sparse tensor of shape \(-12, 16\), wanted 1 to 32 sizes"),
    "two negative sizes": (set_dims(-12, -16), r"got a sparse tensor of shape \(-12, -16\), wanted"),
    "terabytes": (set_dims(2**20, 2**20), r"got a sparse tensor of shape \(1048576, 1048576\), wanted .* at most 2 GB"),
    "beyond int64": (set_dims(2**62, 2**62), "got a sparse tensor of shape .*, wanted .* at most 2 GB"),
    "no dimension": (set_dims(), r"got a sparse tensor of shape \(\), wanted 1 to 32 sizes"),
    "many dimensions": (set_dims(*[1] * 99), "got a sparse tensor of shape .*, wanted 1 to 32 sizes"),
    "values elsewhere": (
        lambda t: setattr(t.values, "data_location", TensorProto.EXTERNAL),
        "got a sparse tensor in another file, wanted its values in the model",
    ),
    "indices elsewhere": (
        lambda t: setattr(t.indices, "data_location", TensorProto.EXTERNAL),
        "got a sparse tensor in another file, wanted its values in the model",
    ),
    "values of no dtype": (lambda t: setattr(t.values, "data_type", 99), "got a damaged model"),
}


@pytest.mark.parametrize("is_constant", [False, True])
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_sparse_tensor_is_refused_by_one_line(name, is_constant):
    change, said = DAMAGES[name]
    with pytest.raises(InputError, match=rf"^model: (w: )?{said}") as caught:
        from_onnx(of_sparse(is_constant, change))
    assert "\n" not in str(caught.value)


def test_a_constant_in_another_file_is_named():
    tensor = numpy_helper.from_array(WEIGHT, "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    with pytest.raises(InputError, match=r"^model: got initializer 'w' in another file, wanted its values"):
        from_onnx(of_constants(node("Constant", "", "w", value=tensor)))


def test_a_sparse_initializer_that_stays_with_onnx_runtime():
    """Of a dense layer, beside a pruned one."""
    dense = np.arange(1, 16 * 12 + 1, dtype=f32).reshape(16, 12)
    tensor = stored(np.arange(dense.size), dense.flatten(), "d", dense.shape)
    nodes = [node("MatMul", "x w", "h"), node("MatMul", "h d", "y")]
    original = model(nodes, {"w": WEIGHT}, {"x": ["batch", 12]}, ["y"], sparse=[tensor])
    module = from_onnx(original)
    assert module.parts == 1
    assert_exact(module(X), runtime(original, X)[0])


def test_external_data(tmp_path):
    large = sparse_floats(12, 16)
    path = tmp_path / "m.onnx"
    onnx.save(of_constants(w=large), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert_reads(str(path), large)
    assert_reads(path, large)
    unresolved = onnx.load(path, load_external_data=False)
    with pytest.raises(InputError, match=r"initializer 'w' in another file, wanted its values: give the path"):
        from_onnx(unresolved)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(InputError, match=r"m\.onnx: got a damaged model"):
        from_onnx(path)


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("by_column", [False, True])
def test_quantised_weights_are_dequantised_exactly(opset, dtype, by_column):
    rng = np.random.default_rng(0)
    zero = rng.integers(3, 9, 16 if by_column else ()).astype(dtype)
    scale = (rng.random(16 if by_column else ()) + 0.5).astype(f32)
    least = np.iinfo(dtype).min
    values = np.where(rng.random((12, 16)) < 0.3, rng.integers(least, least + 256, (12, 16)), zero).astype(dtype)
    weight = (values.astype(np.int32) - zero.astype(np.int32)).astype(f32) * scale
    module = assert_reads(
        of_constants(node("DequantizeLinear", "q s z", "w", axis=1), opset=opset, q=values, s=scale, z=zero), weight
    )
    assert module.network.densities[0] < 0.35, "what means zero is pruned"


def test_a_weight_that_is_quantised_in_the_graph():
    nodes = [node("QuantizeLinear", "f s z", "q"), node("DequantizeLinear", "q s z", "w")]
    assert_reads(of_constants(*nodes, f=WEIGHT + f32(0.25), s=f32(1), z=np.int8(0)))


def test_functions_are_inlined():
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    function = helper.make_function("own", "Linear", ["a", "b"], ["c"], [node("MatMul", "a b", "c")], imports)
    graph = of_constants(w=WEIGHT).graph
    del graph.node[:]
    graph.node.append(helper.make_node("Linear", ["x", "w"], ["y"], domain="own"))
    original = helper.make_model(graph, functions=[function], opset_imports=imports, ir_version=8)
    assert_reads(original)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_another_dtype_is_left_and_named(dtype):
    original = of_constants(w=WEIGHT)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    original.graph.initializer[0].CopyFrom(numpy_helper.from_array(WEIGHT.astype(dtype), "w"))
    for value in (*original.graph.input, *original.graph.output):
        value.type.tensor_type.elem_type = kind
    with pytest.raises(InputError, match="wanted a Gemm or MatMul by a constant float32 weight of which 50% is zero"):
        from_onnx(original)


def test_a_dense_graph_is_refused():
    with pytest.raises(InputError, match=r"^model: got a graph without pruned linear layers, wanted a Gemm or MatMul"):
        from_onnx(of_constants(w=np.ones((12, 16), f32)))


def test_products_of_integers_are_named():
    nodes = [
        node("DynamicQuantizeLinear", "x", "q s z"),
        node("MatMulInteger", "q w z", "i"),
        node("Cast", "i", "f", to=FLOAT),
        node("Mul", "f s", "y"),
    ]
    original = model(nodes, {"w": WEIGHT.astype(np.int8)}, {"x": ["batch", 12]}, ["y"])
    with pytest.raises(InputError, match=r"MatMulInteger \(1\), which multiply integers, wanted"):
        from_onnx(original)


def test_what_is_no_model_is_refused_by_one_line(tmp_path):
    path = tmp_path / "m.onnx"
    with pytest.raises(FileNotFoundError, match=r"m\.onnx: no such file, wanted an ONNX model"):
        from_onnx(path)
    path.write_bytes(b"no model at all")
    with pytest.raises(InputError, match=r"m\.onnx: got a damaged model"):
        from_onnx(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"m\.onnx: got a file without a graph, wanted an ONNX model"):
        from_onnx(path)
    with pytest.raises(TypeError, match=r"source: got a int, wanted a path or an onnx\.ModelProto"):
        from_onnx(3)
    old = of_constants(w=WEIGHT)
    old.opset_import[0].version = 6
    with pytest.raises(InputError, match="got operator set 6, wanted 7 or a later one"):
        from_onnx(old)
    with pytest.raises(InputError, match="precision: got 'fp8', wanted one of fp32, bf16, int8"):
        from_onnx(of_constants(w=WEIGHT), "fp8")


def test_a_truncated_file_never_passes(tmp_path):
    path = tmp_path / "m.onnx"
    whole = of_constants(w=WEIGHT).SerializeToString()
    for length in range(1, len(whole), 13):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"m\.onnx") as caught:
            from_onnx(path)
        assert "\n" not in str(caught.value)


MODEL = of_constants(
    node("Constant", "", "three", value_float=3.0),
    node("Mul", "q three", "w"),
    node("MatMul", "x more", "z"),
    q=WEIGHT,
    sparse=[stored(np.array([3, 50]), np.ones(2, f32), "more")],
)
MODEL.graph.output.append(helper.make_tensor_value_info("z", FLOAT, ["batch", 16]))
WHOLE = MODEL.SerializeToString()


def test_the_model_whose_bytes_change_reads_its_sparse_tensor():
    module = from_onnx(MODEL)
    assert sorted(int(call.network.mask(0, "task").sum()) for call in module.calls.values()) == [2, (WEIGHT != 0).sum()]


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255))
@settings(max_examples=100)
def test_a_changed_byte_is_one_error_or_another_model(place, byte):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        path.write_bytes(WHOLE[:place] + bytes([byte]) + WHOLE[place + 1 :])
        try:
            from_onnx(path)
        except InputError as error:
            assert str(error).startswith(str(path))
            assert "\n" not in str(error)


def test_damage_within_a_graph_is_named():
    unknown = of_constants(node("Nonsense", "i", "w"), i=WEIGHT)
    with pytest.raises(InputError, match=r"got a damaged model .*Nonsense"):
        from_onnx(unknown)
    short = of_constants(w=WEIGHT)
    short.graph.initializer[0].raw_data = short.graph.initializer[0].raw_data[:-4]
    with pytest.raises(InputError, match=r"^model: .*got a damaged model"):
        from_onnx(short)
    absent = of_constants(node("Identity", "i", "w"))
    with pytest.raises(InputError, match="got a damaged model"):
        from_onnx(absent)


def test_an_operator_that_onnx_runtime_lacks_is_named():
    nodes = [node("MatMul", "x w", "h"), helper.make_node("Nonsense", ["h"], ["y"], name="n", domain="own")]
    original = model(nodes, {"w": WEIGHT}, {"x": ["batch", 12]}, ["y"])
    with pytest.raises(InputError, match=r"got a part that does not run, from Nonsense 'n' on: .*Nonsense"):
        from_onnx(original)


@pytest.mark.parametrize("is_input", [False, True])
def test_a_port_that_torch_has_no_dtype_for_is_named(is_input):
    original = of_constants(w=WEIGHT)
    strings = helper.make_tensor_value_info("text", TensorProto.STRING, ["batch"])
    original.graph.input.append(strings)
    kind, name = "input", "text"
    if not is_input:
        original.graph.input[-1].type.tensor_type.elem_type = TensorProto.BFLOAT16
        original.graph.node.append(node("Identity", "text", "copied"))
        original.graph.output.append(helper.make_tensor_value_info("copied", TensorProto.BFLOAT16, ["batch"]))
        kind, name = "output", "copied"
    with pytest.raises(InputError, match=f"{kind} '{name}': got elements of type .*, wanted a tensor of numbers"):
        from_onnx(original)


@pytest.mark.parametrize("is_computed", [False, True])
def test_an_output_that_no_input_decides_is_returned(is_computed):
    original = of_constants(w=WEIGHT, c=np.arange(3, dtype=f32))
    name = "d" if is_computed else "c"
    if is_computed:
        original.graph.node.append(node("Neg", "c", "d"))
    original.graph.output.append(helper.make_tensor_value_info(name, FLOAT, [3]))
    module = from_onnx(original)
    for copied in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        for found, wanted in zip(copied(X), runtime(original, X), strict=True):
            assert_exact(found, wanted)
    module(X)[1].fill_(9.0)
    assert_exact(module(X)[1], runtime(original, X)[1])
    other = copy.deepcopy(original)
    other.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.full(3, 5, f32), "c"))
    module.load_state_dict(from_onnx(other).state_dict())
    assert_exact(module(X)[1], runtime(other, X)[1])


def test_a_constant_output_that_numpy_lacks_is_named():
    original = of_constants(w=WEIGHT, c=np.ones(3, f32))
    original.graph.node.append(node("SequenceConstruct", "c c", "d"))
    original.graph.output.append(helper.make_tensor_value_info("d", FLOAT, [3]))
    with pytest.raises(InputError, match=r"^model: "):
        from_onnx(original)


def test_an_output_that_nothing_makes_is_named(monkeypatch):
    original = of_constants(w=WEIGHT)
    original.graph.output.append(helper.make_tensor_value_info("z", FLOAT, ["batch", 16]))
    with pytest.raises(InputError, match=r"^model: .*'z'"):
        from_onnx(original)
    monkeypatch.setattr(onnx.checker, "check_model", lambda model: None)  # as that of some versions of onnx
    with pytest.raises(InputError, match=r"^model: output 'z': got one that nothing makes, wanted a node's output"):
        from_onnx(original)
