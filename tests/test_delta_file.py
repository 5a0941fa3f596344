from __future__ import annotations

import json
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from delta_strategies import DTYPES, chain, densities, dtypes, ints, random_bits, seeds, shapes
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from rlvr_lightning.delta import SparseDelta, TensorDelta, digest_state
from rlvr_lightning.delta import codec as delta_codec
from rlvr_lightning.delta import file as delta_file
from rlvr_lightning.delta.codec import decode, encode, from_varints, to_varints
from rlvr_lightning.delta.file import load_delta, save_delta

quick = settings(max_examples=60, deadline=None)


def entries(delta: TensorDelta) -> tuple[list[int], list[int]]:
    return delta.indices.tolist(), ints(delta.values)


def pair(seed: int, density: float = 0.3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two states with all kinds of dtypes, an empty tensor and a tied one."""
    before, after = {}, {}
    for i, dtype in enumerate(DTYPES):
        before[f"t{i}"], after[f"t{i}"] = chain(seed + i, [(3, 5), (7,), (0, 2), ()][i % 4], dtype, density, 2)
    before["tied"], after["tied"] = before["t0"], after["t0"]
    return before, after


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("delta")


@quick
@given(seed=seeds, shape=shapes, dtype=dtypes, density=densities, with_base=st.booleans())
def test_files_bring_back_every_bit(
    folder: Path, seed: int, shape: tuple, dtype: torch.dtype, density: float, with_base: bool
) -> None:
    old, new = chain(seed, shape, dtype, density, 2)
    delta = SparseDelta.capture({"w": old}, {"w": new}, digests=not with_base)
    save_delta(folder / "x.delta", delta, {"w": old} if with_base else None)
    file = load_delta(folder / "x.delta")
    assert file.needs_base == with_base and file.tensors["w"].changed == len(delta["w"])
    assert (file.base_digest, file.result_digest) == (digest_state({"w": old}), digest_state({"w": new}))
    assert entries(file.load({"w": old})["w"]) == entries(delta["w"])
    state = {"w": old.clone()}
    file.apply_(state)
    assert ints(state["w"]) == ints(new)
    if not with_base:
        assert entries(file.load()["w"]) == entries(delta["w"])


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.003, 0.2, 1.0])
def test_many_segments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, share: float, with_base: bool) -> None:
    monkeypatch.setattr(delta_file, "SEGMENT", 1000)
    generator = np.random.default_rng(1)
    old = torch.from_numpy(generator.normal(0, 0.02, 3 * 5003).astype(np.float32)).view(3, 5003)
    mask = torch.from_numpy(generator.random((3, 5003)) < share)
    old, new = old.bfloat16(), torch.where(mask, old * 1.02, old).bfloat16()
    new[0, 2000:4000] = old[0, 2000:4000]
    delta = SparseDelta.capture({"w": old}, {"w": new}, digests=True)
    save_delta(tmp_path / "x", delta, {"w": old} if with_base else None)
    file = load_delta(tmp_path / "x")
    assert [(first, length) for first, length, _ in file.segments("w")][-1] == (15_000, 9)
    assert entries(file.load({"w": old})["w"]) == entries(delta["w"])


def test_what_does_not_pay_is_stored_whole(tmp_path: Path) -> None:
    old, new = (random_bits((41, 97), torch.bfloat16, np.random.default_rng(seed)) for seed in (1, 2))
    a, b = {"w": old, "v": old[:3].clone()}, {"w": new, "v": old[:3].clone()}
    save_delta(tmp_path / "x", SparseDelta.capture(a, b), a)
    file = load_delta(tmp_path / "x")
    assert (file.tensors["w"].raw, file.tensors["v"].raw) == (41 * 97, 0)
    assert file.tensors["w"].end - file.tensors["w"].start == 41 * 97 * 2 + 13
    assert file.tensors["v"].end - file.tensors["v"].start == 1
    file.apply_(a)
    assert ints(a["w"]) == ints(new)


def test_small_updates_cost_less_than_a_byte(tmp_path: Path) -> None:
    """Of 10 ** 6 normal weights, those are changed that an update of 2e-6 moves to the next bf16: about 1 in 36."""
    generator = np.random.default_rng(0)
    master = torch.from_numpy(generator.normal(0, 0.05, 1_000_000).astype(np.float32))
    step = torch.from_numpy(generator.normal(0, 2e-6, 1_000_000).astype(np.float32))
    a, b = {"w": master.bfloat16()}, {"w": (master + step).bfloat16()}
    delta = SparseDelta.capture(a, b)
    assert 0.005 < delta.density < 0.05
    save_delta(tmp_path / "x", delta, a)
    assert (tmp_path / "x").stat().st_size / delta.changed < 0.95


def test_the_container_is_safetensors(tmp_path: Path) -> None:
    a, b = pair(3)
    delta = SparseDelta.capture(a, b, digests=True)
    save_delta(tmp_path / "x", delta, a)
    with safe_open(tmp_path / "x", "pt") as file:
        assert set(file.keys()) == set(delta)
        assert file.get_tensor("t0").dtype == torch.uint8
        metadata = file.metadata()
    assert metadata["format"] == "rlvr_lightning.delta" and metadata["base_digest"] == digest_state(a)
    assert json.loads(metadata["tensors"])["t0"] == ["bfloat16", [3, 5], len(delta["t0"]), 15]  # too small to pay
    assert json.loads(metadata["aliases"]) == {"tied": "t0"}
    assert load_delta(tmp_path / "x").load(a).aliases == {"tied": "t0"}


@pytest.mark.parametrize("with_base", [True, False])
def test_every_altered_byte_and_every_cut_is_noticed(tmp_path: Path, with_base: bool) -> None:
    a, b = (({n: s[n] for n in ("t0", "t2", "tied")}) for s in pair(4))
    delta, path = SparseDelta.capture(a, b, digests=True), tmp_path / "x"
    save_delta(path, delta, a if with_base else None)
    good, bad = path.read_bytes(), tmp_path / "bad"
    state = {name: a[name].clone() for name in ("t0", "t2")}
    stride = 1 if with_base else 7
    variants = [good[:n] for n in range(0, len(good), stride)] + [good + b" ", good + good]
    for at in range(0, len(good), stride):
        flipped = good[at] ^ (1, 0x20, 0x80)[at % 3]
        variants.append(good[:at] + bytes([flipped]) + good[at + 1 :])
    for variant in variants:
        bad.write_bytes(variant)
        with pytest.raises(ValueError, match=r"^delta: .*(no delta file, truncated or altered|version).*$"):
            load_delta(bad).apply_(state)
    assert all(ints(state[n]) == ints(a[n]) for n in state)
    load_delta(path).apply_(state)
    assert all(ints(state[n]) == ints(b[n]) for n in state)


def test_other_versions_and_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    a, b = pair(5)
    with monkeypatch.context() as patched:
        patched.setattr("rlvr_lightning.delta.writer.VERSION", "2")
        save_delta(tmp_path / "x", SparseDelta.capture(a, b), a)
    with pytest.raises(ValueError, match="has version '2', this program reads '1'"):
        load_delta(tmp_path / "x")
    save_file({"w": torch.zeros(3)}, tmp_path / "y")
    with pytest.raises(ValueError, match="no delta file"):
        load_delta(tmp_path / "y")


@pytest.mark.parametrize("with_base", [True, False])
def test_a_wrong_base_is_left_untouched(tmp_path: Path, with_base: bool) -> None:
    a, b = pair(6)
    save_delta(tmp_path / "x", SparseDelta.capture(a, b, digests=True), a if with_base else None)
    file = load_delta(tmp_path / "x")
    wrong = {name: tensor.clone() for name, tensor in a.items()}
    wrong["t1"].view(torch.int16)[2] ^= 1
    before = {name: tensor.clone() for name, tensor in wrong.items()}
    with pytest.raises(ValueError, match="it starts from"):
        file.apply_(wrong)
    with pytest.raises(ValueError, match="'t1' has shape"):
        file.apply_({**a, "t1": a["t1"][:3]})
    with pytest.raises(ValueError, match="no tensor 't1'"):
        file.apply_({name: a[name] for name in a if name != "t1"})
    assert all(ints(wrong[n]) == ints(before[n]) for n in wrong)
    if with_base:
        with pytest.raises(ValueError, match="written against its base; give the state"):
            file.load()
        with pytest.raises(ValueError, match="it starts from"):
            save_delta(tmp_path / "y", SparseDelta.capture(a, b, digests=True), wrong)
    with pytest.raises(ValueError, match="needs the digests"):
        save_delta(tmp_path / "y", SparseDelta.capture(a, b))
    assert not (tmp_path / "y").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair(7)
    save_delta(tmp_path / "x", SparseDelta.capture(a, b), a)
    good, calls = (tmp_path / "x").read_bytes(), iter(range(3))

    def fails(*arguments: object) -> bytes:
        next(calls)
        return encode(*arguments)

    monkeypatch.setattr(delta_file, "encode", fails)
    with pytest.raises((StopIteration, RuntimeError)):
        save_delta(tmp_path / "x", SparseDelta.capture(b, a), b)
    assert (tmp_path / "x").read_bytes() == good
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@quick
@given(numbers=st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 300)))
def test_varints(numbers: list[int]) -> None:
    data = to_varints(np.array(numbers, np.uint64))
    naive = bytearray()
    for number in numbers:
        while number > 127:
            naive.append(number & 127 | 128)
            number >>= 7
        naive.append(number)
    assert data == bytes(naive)
    assert from_varints(data, len(numbers), 10).tolist() == numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_neighbouring_floats_are_one_apart(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15).short()
    ranks = delta_codec.ordered(patterns.numpy(), dtype)
    assert np.array_equal(delta_codec.ordered(ranks, dtype), patterns.numpy())
    values = patterns.view(dtype).float()
    finite = values.isfinite().numpy()
    order = np.argsort(ranks[finite])
    ascending = values.numpy()[finite][order]
    assert (np.diff(ascending) >= 0).all() and (np.diff(ranks[finite][order].astype(int)) == 1).all()


@settings(max_examples=150, deadline=None)
@given(seed=seeds, kind=st.integers(0, 5), garbage=st.binary(max_size=60), dtype=dtypes, has_base=st.booleans())
def test_hostile_segments(seed: int, kind: int, garbage: bytes, dtype: torch.dtype, has_base: bool) -> None:
    generator = np.random.default_rng(seed)
    base = delta_file.signed(delta_file.bits(random_bits((50,), dtype, generator))) if has_base else None
    size = len(garbage) // 2
    packed = [delta_codec._deflate(part) for part in (garbage[:size], garbage[size:])]
    count = int(generator.choice([0, 1, 7, 49, 50, 51, 2**32 - 1]))
    head = bytes([kind]) + delta_codec.HEAD.pack(count, len(packed[0]), len(packed[1]))
    for blob in (bytes([kind]) + garbage, head + packed[0] + packed[1]):
        try:
            positions, values = decode(blob, base, 50, dtype)
        except ValueError as error:
            assert str(error).startswith("delta: ") and "\n" not in str(error)
        else:
            assert len(positions) == len(values) and (np.diff(positions) > 0).all()
            assert not len(positions) or (positions[0] >= 0 and positions[-1] < 50)


def test_a_bomb_is_not_unpacked() -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = packer.compress(bytes(50_000_000)) + packer.flush()
    blob = bytes([delta_codec.PLAIN]) + delta_codec.HEAD.pack(3, len(bomb), 0) + bomb
    tracemalloc.start()
    with pytest.raises(ValueError, match="malformed"):
        decode(blob, None, 10, torch.bfloat16)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_a_segment_of_another_base_is_noticed() -> None:
    """Three of eight entries of exponent 127 changed; in the other base only two have that exponent."""
    base = torch.ones(2000).bfloat16().view(torch.int16).numpy()
    other = base * np.int16(2)
    other[:2] = base[:2]
    positions = np.array([1, 3, 1999])
    blob = encode(positions, base[positions] + np.int16(1), base, 2000, torch.bfloat16)
    assert blob[0] == delta_codec.BY_EXPONENT
    with pytest.raises(ValueError, match="does not fit the base"):
        decode(blob, other, 2000, torch.bfloat16)


def test_only_one_spelling_of_the_header(tmp_path: Path) -> None:
    a, b = pair(8)
    save_delta(tmp_path / "x", SparseDelta.capture(a, b), a)
    good = (tmp_path / "x").read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")
    assert good[end - 1 : end] == b" "
    (tmp_path / "x").write_bytes(good[: end - 1] + b"\n" + good[end:])
    with pytest.raises(ValueError, match="its header is altered"):
        load_delta(tmp_path / "x")
