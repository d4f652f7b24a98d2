"""Members that cannot be used are named with their reason, and the others go on."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import toys

from fastrecycle.info import describe
from fastrecycle.lora import Head, LoRABank
from fastrecycle.vetting import Member, read_members, vet, vetted_bank


def reasons(*loras, **arguments):
    good, out = vet([Member(x.name, x) for x in loras], **arguments)
    assert len(good) + len(out) == len(loras)
    return out


def test_sound_bank_stays_whole():
    assert reasons(*toys.bank(5), config=toys.CONFIG) == {}
    assert reasons(*toys.bank(5)) == {}


def test_each_fault_is_named():
    good = [replace(toys.lora(i), name=f"good{i}") for i in range(4)]
    zero = replace(toys.lora(5), b={t: 0 * x for t, x in toys.lora(5).b.items()}, name="zero")
    nan = replace(toys.lora(6), name="nan")
    nan.a["q"][0, 0, 0] = float("nan")
    wide = replace(toys.lora(7, config=replace(toys.CONFIG, width=32)), name="wide")
    bare = replace(toys.lora(8), head=None, class_names=None, name="bare")
    flat = replace(toys.lora(9), head=Head(torch.ones(3, 16)), name="flat")
    single = replace(toys.lora(10, ways=1), name="single")
    out = reasons(*good, zero, nan, wide, bare, flat, single, config=toys.CONFIG)
    for name, part in (
        ("zero", "changes nothing"), ("nan", "NaN"), ("wide", "belongs to another model"),
        ("bare", "no head"), ("flat", "tells no classes apart"), ("single", "1 class"),
    ):  # fmt: skip
        assert part in out[name], name
    assert len(out) == 6
    assert "bare" not in reasons(*good, bare, heads=False)


def test_without_a_backbone_most_members_say_what_is_usual():
    wide = replace(toys.lora(7, config=replace(toys.CONFIG, width=32)), name="wide")
    out = reasons(*toys.bank(3), wide)
    assert out == {"wide": "made for another model: q is 32 -> 32, most are 16 -> 16"}
    bases = ["org/a", "org/a", "org/b", "/home/me/a", None]
    named = [replace(toys.lora(i), base_model=base) for i, base in enumerate(bases)]
    assert reasons(*named) == {"0002": "made for org/b, most for org/a"}
    assert reasons(*named[1:3]) == {}  # one each


def test_duplicates_are_found_whatever_their_factors():
    first = toys.lora(0)
    turn = torch.linalg.qr(torch.randn(2, 2, generator=toys.generator(0)))[0]
    turned = replace(
        first, a={t: turn @ x for t, x in first.a.items()},
        b={t: x @ turn.T for t, x in first.b.items()}, name="turned",
    )  # fmt: skip
    half = replace(
        first, a={t: x.half().float() for t, x in first.a.items()}, name="half"
    )  # a copy stored in float16
    padded = replace(
        first, a={t: torch.cat((x, 0 * x), 1) for t, x in first.a.items()},
        b={t: torch.cat((x, 0 * x), 2) for t, x in first.b.items()}, name="padded",
    )  # fmt: skip
    other_head = replace(first, head=toys.lora(3).head, name="other head")
    near = replace(first, b={t: 1.02 * x for t, x in first.b.items()}, name="near")
    out = reasons(first, toys.lora(1), turned, other_head, half, near, padded)
    assert out.keys() == {"turned", "half", "padded"}
    assert out["turned"] == "the same as 0000"


def test_folder_is_read_member_by_member(tmp_path, caplog):
    toys.bank(4).save(tmp_path)
    file = tmp_path / "0002" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with caplog.at_level("WARNING"):
        bank, out = vetted_bank(tmp_path, toys.vit())
    assert [x.name for x in bank] == ["0000", "0001", "0003"]
    assert list(out) == ["0002"]
    assert "left out 0002" in caplog.text
    assert "adapter_model.safetensors" in out["0002"]
    for i in (0, 1, 3):
        (tmp_path / f"000{i}" / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="none of 4 LoRAs can be used; 0000: "):
        vetted_bank(tmp_path, toys.vit())
    with pytest.raises(FileNotFoundError, match="no such folder"):
        vetted_bank(tmp_path / "absent", toys.vit())


def test_list_mixes_folders_single_loras_and_the_hub(tmp_path, monkeypatch):
    toys.bank(2).save(tmp_path / "some")
    toys.lora(4).save(tmp_path / "single")
    toys.lora(5).save(tmp_path / "cache")
    asked = []

    def snapshot_download(repo, revision=None, allow_patterns=()):
        asked.append((repo, revision))
        assert "*.py" not in allow_patterns
        if repo == "org/absent":
            raise RuntimeError("404")
        return str(tmp_path / "cache")

    hub = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    listed = tmp_path / "market.txt"
    listed.write_text(
        "# a market\nsome\nsingle   # one\n\nhf:org/lora@main\nhf:org/absent\nhf:../../x\n"
    )
    members = read_members(listed)
    assert [m.name for m in members] == [
        "0000", "0001", "single", "hf:org/lora@main", "hf:org/absent", "hf:../../x",
    ]  # fmt: skip
    assert asked == [("org/lora", "main"), ("org/absent", None)]
    assert "cannot be downloaded" in members[4].problem
    assert "expected hf:OWNER/REPO" in members[5].problem
    bank, out = vetted_bank(listed, toys.vit())
    assert len(bank) == 4
    assert len(out) == 2
    found = describe(str(listed))
    assert found.lines[0] == "bank of 6 LoRAs, 4 of them usable"
    assert len(found.problems) == 2
    with pytest.raises(FileNotFoundError, match="no such list"):
        read_members(tmp_path / "absent.txt")


def test_info_names_what_is_wrong_with_a_bank(tmp_path):
    first = toys.lora(0)
    LoRABank([first, toys.lora(1), replace(first, name="0002")]).save(tmp_path)
    found = describe(str(tmp_path))
    assert found.problems == ["0002: the same as 0000"]
    assert "bank of 3 LoRAs, 2 of them usable" in found.lines
