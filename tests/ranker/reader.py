"""A second reader of artefacts, written from docs/artefact.md with NumPy and JSON alone; it computes in float64.

It trusts the file but for its checksum: what a file may not hold is the business of `lt4rec_sparse.load`.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any, NamedTuple

import numpy as np

DTYPES = {
    "F32": ("<f4", "float32"),
    "F16": ("<f2", "float16"),
    "BF16": ("<u2", "bfloat16"),
    "F64": ("<f8", "float64"),
    "U8": ("u1", "uint8"),
    "I8": ("i1", "int8"),
    "I32": ("<i4", "int32"),
    "I64": ("<i8", "int64"),
}
ERF = np.vectorize(math.erf, otypes=[np.float64])
ACTIVATIONS = {
    "none": lambda z, slope: z,
    "relu": lambda z, slope: np.maximum(z, 0),
    "sigmoid": lambda z, slope: 1 / (1 + np.exp(-z)),
    "tanh": lambda z, slope: np.tanh(z),
    "silu": lambda z, slope: z / (1 + np.exp(-z)),
    "hardswish": lambda z, slope: z * np.clip(z + 3, 0, 6) / 6,
    "gelu": lambda z, slope: z * (1 + ERF(z / math.sqrt(2))) / 2,
    "gelu_tanh": lambda z, slope: z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2,
    "leaky_relu": lambda z, slope: np.where(z > 0, z, slope * z),
    "elu": lambda z, slope: np.where(z > 0, z, slope * np.expm1(np.minimum(z, 0))),
    "dice": lambda z, slope: z * (slope[2] + (1 - slope[2]) / (1 + np.exp(-(slope[0] * z + slope[1])))),
}


class Layer(NamedTuple):
    weight: np.ndarray  # [out, in], float64, 0 where the task's plane has no bit
    bias: np.ndarray
    activation: str
    slope: Any


class Feature(NamedTuple):
    name: str
    kind: str
    type: str
    table: str
    encoding: str
    size: int
    separator: str
    last: int
    target: str | None


class Reader:
    """One file: `score` is what it is for; the rest is public for those who compare."""

    def __init__(self, content: bytes, is_checked: bool = True) -> None:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        self.meta = json.loads(header.pop("__metadata__")["lt4rec_sparse"])
        self.tensors, parts = {}, {}
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            code, of_torch = DTYPES[entry["dtype"]]
            array = np.frombuffer(content[begin:end], code).reshape(entry["shape"])
            # The upper half of a float32 is read as one.
            wide = (array.astype("<u4") << 16).view("<f4") if entry["dtype"] == "BF16" else array
            self.tensors[name] = wide
            parts[name] = f"{name} torch.{of_torch} {list(entry['shape'])}".encode() + content[begin:end]
        if is_checked:
            self._check(parts)
        self.tasks = self.meta["tasks"]
        features = features_of(self.meta["encoder"]["schema"])
        self.numbers = [f for f in features if f.encoding in ("standardised", "log")]
        self.fields = [f for f in features if f.kind != "multi" and f not in self.numbers]
        self.fields += [f for f in features if f.kind == "multi"]
        self.tables = {feature.table: self._rows(feature) for feature in self.fields}

    def score(self, columns: dict[str, list[Any]], given: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """Return each task's probabilities, float64 `[candidates]`; `given`: vectors of fields that are elsewhere."""
        x, scores = self.inputs(columns, given)[0], {}
        for task in self.tasks:
            h = x
            for layer in self.layers(task):
                with np.errstate(over="ignore"):  # exp of much: what is divided by it is 0
                    h = ACTIVATIONS[layer.activation](h @ layer.weight.T + layer.bias, layer.slope)
            scores[task] = h[:, 0]
        return scores

    def inputs(
        self, columns: dict[str, list[Any]], given: dict[str, np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Return what enters the first layer, the sums of its terms' magnitudes, and the most terms of one sum."""
        embedding = self.tensors["inputs.embedding"].astype(np.float64)
        if "inputs.scales" in self.tensors:
            embedding = embedding * self.tensors["inputs.scales"].astype(np.float64)[:, None]
        starts, total = {}, 0
        for table, rows in self.tables.items():
            starts[table] = total
            total += 0 if table in self.meta.get("without", []) else rows
        vectors, magnitudes, terms, units = [], [], self.meta["dim"], 0
        by_name: dict[str, np.ndarray] = {}
        self.peak = 0.0
        for feature in self.fields:
            place, units = units, units + (feature.target is not None)
            if given is not None and feature.name in given:
                vectors.append(given[feature.name].astype(np.float64))
                magnitudes.append(np.abs(vectors[-1]))
                by_name[feature.name] = vectors[-1]
                continue
            bags = [self.ids(feature, value) for value in columns[feature.name]]
            rows = [embedding[[starts[feature.table] + i for i in bag]] for bag in bags]
            if feature.target is not None:
                targets = np.broadcast_to(by_name[feature.target], (len(rows), self.meta["dim"]))
                found = [self.attended(place, h, t) for h, t in zip(rows, targets, strict=True)]
                vectors.append(np.stack([value for value, _ in found]))
                magnitudes.append(np.stack([most for _, most in found]))
                width = len(self.tensors[f"inputs.attention.{place}.bias"])
                # Three sums, one in the other: the roots of their terms add up to that of three times all at most.
                terms = max(terms, 3 * (3 * self.meta["dim"] + width + max(map(len, bags), default=0) + 4))
                continue
            vectors.append(np.stack([r.mean(0) if len(r) else np.zeros(self.meta["dim"]) for r in rows]))
            magnitudes.append(np.stack([np.abs(r).mean(0) if len(r) else np.zeros(self.meta["dim"]) for r in rows]))
            terms = max(terms, *map(len, bags), 1)
            by_name[feature.name] = vectors[-1]
        pairs = [(i, j) for i in range(len(vectors)) for j in range(i + 1, len(vectors))]
        x, most = (
            np.concatenate([*e, *((e[i] * e[j]).sum(1, keepdims=True) for i, j in pairs)], 1)
            for e in (vectors, magnitudes)
        )
        numbers = self.raw_numbers(columns, len(x))
        return np.concatenate([x, numbers], 1), np.concatenate([most, np.abs(numbers)], 1), terms

    def attended(self, place: int, h: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the sum of a bag `h [values, dim]` by attention to `t [dim]`, and of its terms' magnitudes."""
        weight, bias, slope, out, out_bias = (
            self.tensors[f"inputs.attention.{place}.{name}"].astype(np.float64)
            for name in ("weight", "bias", "slope", "out", "out_bias")
        )
        of_bag = np.broadcast_to(t, h.shape)
        z = np.concatenate([h, of_bag, h * of_bag], 1) @ weight.T + bias
        value = (np.where(z > 0, z, slope * z) @ out + out_bias) @ h
        most = np.abs(np.concatenate([h, of_bag, h * of_bag], 1)) @ np.abs(weight).T + np.abs(bias)
        hidden = most * np.maximum(1, np.abs(slope))
        weights = hidden @ np.abs(out) + np.abs(out_bias)
        self.peak = max(self.peak, hidden.max(initial=0), weights.max(initial=0))
        return value, weights @ np.abs(h)

    def raw_numbers(self, columns: dict[str, list[Any]], rows: int) -> np.ndarray:
        """Return the inputs of raw numbers, `[rows, ...]`: float32 as float64, for they are exact."""
        found = [np.zeros((rows, 0))]
        for feature in self.numbers:
            mean, std, missing = (self.tensors[f"encoder.{feature.name}.{part}"] for part in ("mean", "std", "missing"))
            z = np.zeros((rows, len(mean) + int(missing[0])))
            for row, value in enumerate(columns[feature.name]):
                places = numbers_of(feature, value)
                for i, v in enumerate(places):
                    v = signed_log(v) if feature.encoding == "log" else v
                    with np.errstate(over="ignore"):
                        z[row, i] = np.float32((np.float64(v) - mean[i]) / std[i])
                if missing[0]:
                    z[row, -1] = not places
            found.append(z)
        return np.concatenate(found, 1)

    def layers(self, task: str) -> list[Layer]:
        """Return a task's layers, its head last."""
        place, layers = self.tasks.index(task), []
        for i, entry in enumerate(self.meta["layers"]):
            part = {
                name: self.tensors[f"layers.{i}.{name}"] for name in ("bitmask", "row_offsets", "compressed", "bias")
            }
            high, wide = entry.get("block", (1, 1))
            rows, columns = (-(-size // side) for size, side in zip(entry["shape"], (high, wide), strict=True))
            planes = np.unpackbits(part["bitmask"], axis=-1, count=columns, bitorder="little").astype(bool)
            grid = np.zeros((rows, columns, high, wide))
            for row, first in enumerate(part["row_offsets"]):
                there = np.flatnonzero(planes[:, row].any(0))
                grid[row, there] = part["compressed"][first : first + len(there)].reshape(-1, high, wide)
            grid[~planes[place]] = 0
            out, width = entry["shape"]
            dense = grid.transpose(0, 2, 1, 3).reshape(rows * high, columns * wide)[:out, :width]
            slope = self.tensors.get(f"layers.{i}.slope", entry.get("slope", 0.0))
            layers.append(Layer(dense, part["bias"].astype(np.float64), entry["activation"], np.float64(slope)))
        head = [self.tensors[f"heads.{task}.{name}"].astype(np.float64) for name in ("weight", "bias")]
        return [*layers, Layer(*head, "sigmoid", 0.0)]

    def ids(self, feature: Feature, value: Any) -> list[int]:
        """Return the ids of one raw value: one, or those of a bag."""
        if feature.kind != "multi":
            return [0 if is_missing(value) else self._id(feature, value)]
        if isinstance(value, str):
            texts = [text for part in value.split(feature.separator) if (text := part.strip())]
            value = texts if feature.type == "string" else [int(text) for text in texts]
        there = [item for item in ([] if is_missing(value) else value) if not is_missing(item)]
        return [self._id(feature, item) for item in there[-feature.last :]]  # 0 is all

    def _id(self, feature: Feature, value: Any) -> int:
        if feature.kind == "dense":
            return 1 + int((self.tensors[f"encoder.{feature.table}.cuts"] < value).sum())
        if feature.encoding == "hash":
            return 1 + hashed(value) % (feature.size - 1)
        keys = self._keys(feature)
        return 2 + keys.index(value) if value in keys else 1

    def _keys(self, feature: Feature) -> list[Any]:
        if feature.type == "int":
            return self.tensors[f"encoder.{feature.table}.keys"].tolist()
        text = self.tensors[f"encoder.{feature.table}.bytes"].tobytes()
        cuts = self.tensors[f"encoder.{feature.table}.offsets"].tolist()
        return [text[a:b].decode("utf-8", "surrogatepass") for a, b in zip(cuts[:-1], cuts[1:], strict=True)]

    def _rows(self, feature: Feature) -> int:
        if feature.kind == "dense":
            return len(self.tensors[f"encoder.{feature.table}.cuts"]) + 2
        return feature.size if feature.encoding == "hash" else len(self._keys(feature)) + 2

    def _check(self, parts: dict[str, bytes]) -> None:
        described = {key: value for key, value in self.meta.items() if key != "sha256"}
        whole = json.dumps(described, sort_keys=True).encode() + b"".join(parts[name] for name in sorted(parts))
        if hashlib.sha256(whole).hexdigest() != self.meta["sha256"]:
            digests = self.meta.get("digests", {})
            raise ValueError([n for n in parts if digests.get(n) != hashlib.sha256(parts[n]).hexdigest()])


def features_of(schema: dict[str, Any]) -> list[Feature]:
    """Return the features, in order."""
    columns = {column["name"]: column for column in schema["columns"]}
    features = [feature(column, name, column.get("kind", "single")) for name, column in columns.items()]
    bags = []
    for history in schema.get("histories", []):
        if history.get("rates", False):
            names = [f"{history['name']}_{what}" for what in ("count", "rate")]
            features += [feature({"name": name}, name, "dense") for name in names]
        for name in history["columns"]:
            target = name if history.get("pooling") == "attention" else None
            bag = feature({**columns[name], "last": 0}, f"{history['name']}_{name}", "multi")
            bags.append(bag._replace(target=target))
    return features + bags


def feature(column: dict[str, Any], name: str, kind: str) -> Feature:
    get = column.get
    return Feature(
        name,
        kind,
        get("type", "string"),
        get("table", "") or get("target") or column["name"],
        get("encoding", "vocabulary"),
        get("size", 0),
        get("separator", ","),
        get("last", 0),
        get("target"),
    )


def numbers_of(feature: Feature, value: Any) -> list[float]:
    """Return the numbers of one raw value; none if it is missing."""
    if feature.kind == "dense":
        return [] if is_missing(value) else [value]
    if isinstance(value, str):
        value = [float(text) for text in value.split(feature.separator)] if value.strip() else []
    return [] if is_missing(value) or all(map(is_missing, value)) else list(value)


def signed_log(v: float) -> float:
    """Return sign(v) ln(1 + |v|) by the steps of the page."""
    u = 1.0 + abs(v)
    c = (abs(v) - (u - 1.0)) / u
    m, e = math.frexp(u)
    if m < math.sqrt(0.5):
        m, e = 2.0 * m, e - 1
    s = (m - 1.0) / (m + 1.0)
    series = 0.0
    for k in range(21, 0, -2):
        series = series * (s * s) + 1.0 / k
    return math.copysign(e * math.log(2) + (2.0 * s * series + c), v)


def hashed(value: int | str) -> int:
    """Return splitmix64 of an int, BLAKE2b of a string."""
    if isinstance(value, str):
        return int.from_bytes(hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
    most = (1 << 64) - 1
    x = (value + 0x9E3779B97F4A7C15) & most
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & most
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & most
    return x ^ (x >> 31)


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
