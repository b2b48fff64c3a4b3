import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.masks import FORMAT, Mask, overlap, ownership, pack_bits, pack_words, unpack_bits, unpack_words

SHAPES = {"layers.0": (5, 9), "layers.1": (3, 5)}


def random_mask(seed: int, density: float = 0.5) -> Mask:
    generator = torch.Generator().manual_seed(seed)
    return Mask.random(SHAPES, {n: round(r * c * density) for n, (r, c) in SHAPES.items()}, generator)


@given(st.integers(0, 70), st.integers(0, 4), st.integers(0, 2**31))
def test_bits_round_trip(columns, rows, seed):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = pack_bits(mask)
    assert bits.shape == (rows, (columns + 7) // 8)
    assert bits.dtype == torch.uint8
    assert torch.equal(unpack_bits(bits, columns), mask)


def test_bit_order_is_least_significant_first():
    mask = torch.zeros(1, 10, dtype=torch.bool)
    mask[0, [0, 3, 9]] = True
    assert pack_bits(mask).tolist() == [[0b1001, 0b10]]


def test_padding_bits_must_be_zero():
    with pytest.raises(ValueError, match="padding bit beyond column 2"):
        unpack_bits(torch.tensor([[0b1000]], dtype=torch.uint8), 3)


def test_unpack_names_the_wanted_byte_count():
    with pytest.raises(ValueError, match=r"wanted torch.uint8 \[..., 2\]"):
        unpack_bits(torch.zeros(1, 1, dtype=torch.uint8), 9)


@given(st.integers(1, 300), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**31))
def test_words_round_trip(columns, rows, tasks, seed):
    masks = torch.rand(tasks, rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    words = pack_words(masks)
    assert words.shape == (tasks, rows, 4 * ((columns + 127) // 128))
    assert words.dtype == torch.int32
    assert torch.equal(unpack_words(words, columns), masks)
    bits = words.view(torch.uint8)
    assert torch.equal(bits[..., : (columns + 7) // 8], pack_bits(masks))
    assert not bits[..., (columns + 7) // 8 :].any()  # a kernel's tile reads the padding too


@pytest.mark.parametrize("column", [0, 31, 32, 127, 128, 130])
def test_a_column_is_one_bit_of_one_word(column):
    mask = torch.zeros(1, 131, dtype=torch.bool)
    mask[0, column] = True
    words = [word & 0xFFFFFFFF for word in pack_words(mask)[0].tolist()]
    assert words == [1 << column % 32 if word == column // 32 else 0 for word in range(8)]


def test_unpacking_words_does_not_look_at_the_padding():
    assert unpack_words(torch.full((1, 4), -1, dtype=torch.int32), 3).tolist() == [[True, True, True]]


def test_counts():
    mask = Mask({"a": torch.tensor([[True, False], [True, True]]), "b": torch.zeros(1, 4, dtype=torch.bool)})
    assert (mask.nnz, mask.size, mask.density) == (3, 8, 3 / 8)
    assert mask.layer_density() == {"a": 0.75, "b": 0.0}


def test_a_mask_does_not_follow_the_tensor_it_was_made_from():
    kept = torch.ones(2, 2, dtype=torch.bool)
    mask = Mask({"a": kept})
    kept[0, 0] = False
    assert mask.nnz == 4


def test_random_counts_are_exact_and_seeded():
    assert random_mask(0).layer_nnz() == {"layers.0": 22, "layers.1": 8}
    assert random_mask(0) == random_mask(0)
    assert random_mask(0) != random_mask(1)


@given(st.integers(0, 2**31), st.floats(0, 1))
def test_save_and_load_are_identical(tmp_path_factory, seed, density):
    path = tmp_path_factory.mktemp("mask") / "mask.safetensors"
    mask = random_mask(seed, density)
    mask.save(path)
    assert Mask.load(path) == mask


def test_load_refuses_a_damaged_file(tmp_path):
    path = tmp_path / "mask.safetensors"
    random_mask(0).save(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match=r"mask\.safetensors: got no readable mask"):
        Mask.load(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "got format None, wanted lt4rec_sparse.mask.v1"),
        ({"format": "lt4rec_sparse.mask.v0"}, "got format lt4rec_sparse.mask.v0"),
        ({FORMAT: "{"}, "got a damaged mask .*no JSON"),
        ({FORMAT: "[" * 100_000}, "got a damaged mask .*nested too deeply"),
        ({FORMAT: "{}"}, "got a damaged mask .*got no layer"),
        ({FORMAT: '{"b": [2, 9]}'}, "got a damaged mask .*got None"),
        ({FORMAT: '{"a": [2]}'}, r"got a damaged mask .*for \[2\]"),
        ({FORMAT: '{"a": [3, 9]}'}, r"got a damaged mask .*got \(2, 2\) for \[3, 9\]"),
        ({FORMAT: '{"a": [2, 8]}'}, "got a damaged mask .*wanted torch.uint8"),
        ({FORMAT: '{"a": [2, -7]}'}, "got a damaged mask"),
        ({FORMAT: '{"a": [2, 9.0]}'}, "got a damaged mask"),
        ({FORMAT: '{"a": [2, 4611686018427387904]}'}, "got a damaged mask"),
    ],
)
def test_load_names_what_a_file_lacks(tmp_path, metadata, message):
    path = tmp_path / "mask.safetensors"
    save_file({"a.bitmask": torch.zeros(2, 2, dtype=torch.uint8)}, path, metadata=metadata)
    with pytest.raises(InputError, match=rf"mask\.safetensors: {message}") as caught:
        Mask.load(path)
    assert "\n" not in str(caught.value)


def test_equal_masks_are_equal_files(tmp_path):
    for i in range(8):
        random_mask(0).save(tmp_path / str(i))
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_a_mask_of_0_1_0_is_read(tmp_path):
    mask = random_mask(0)
    tensors = {f"{name}.bitmask": pack_bits(kept) for name, kept in mask.items()}
    shapes = '{"layers.0": [5, 9], "layers.1": [3, 5]}'
    save_file(tensors, tmp_path / "mask.safetensors", metadata={"format": FORMAT, "shapes": shapes})
    assert Mask.load(tmp_path / "mask.safetensors") == mask


def test_overlap_and_ownership():
    a = Mask({"w": torch.tensor([[True, True, False, False]])})
    b = Mask({"w": torch.tensor([[True, False, True, False]])})
    assert overlap(a, b) == {"w": 1 / 3}
    assert ownership({"ctr": a, "cvr": b}) == {"w": {"shared": 1, "ctr only": 1, "cvr only": 1, "dead": 1}}


@given(st.lists(st.integers(0, 2**31), min_size=1, max_size=4))
def test_owners_add_up_to_the_layer(seeds):
    counts = ownership({f"task{i}": random_mask(seed) for i, seed in enumerate(seeds)})
    assert {name: sum(c.values()) for name, c in counts.items()} == {"layers.0": 45, "layers.1": 15}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, "got no layer"),
        ({"a": torch.ones(2, dtype=torch.bool)}, r"mask of a: got shape \(2,\)"),
    ],
)
def test_bad_layers(layers, message):
    with pytest.raises(ValueError, match=message):
        Mask(layers)


def test_float_masks_are_refused():
    with pytest.raises(TypeError, match=r"mask of a: got dtype torch.float32, wanted torch.bool"):
        Mask({"a": torch.ones(2, 2)})


def test_different_layers_do_not_compare():
    with pytest.raises(ValueError, match="masks over different layers"):
        overlap(Mask({"a": torch.ones(1, 1, dtype=torch.bool)}), Mask({"b": torch.ones(1, 1, dtype=torch.bool)}))
