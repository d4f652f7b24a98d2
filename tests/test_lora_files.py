"""LoRAs in single files: LoRA Recycle's release and CLIP-LoRA's checkpoints, as they write them."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastrecycle.info import describe
from fastrecycle.lora import LoRA, LoRABank
from fastrecycle.vit import ViT
from fastrecycle.vit_config import ViTConfig

CONFIG = ViTConfig(
    image_size=32, patch_size=16, width=24, depth=12, heads=2, mlp_dim=32, out_dim=8
)  # fmt: skip
TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def vit():
    return ViT.random(CONFIG)


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


# ------------------------------------------------------------------ LoRA Recycle


class ReleasedLoRA(nn.Module):
    """Linear layers in the release's order: q and v of each block, then the head."""

    def __init__(self, depth=12, rank=4, classes=5):
        super().__init__()
        d = CONFIG.width
        self.w_as = [nn.Linear(d, rank, bias=False) for _ in range(2 * depth)]
        self.w_bs = [nn.Linear(rank, d, bias=False) for _ in range(2 * depth)]
        self.head = nn.Linear(CONFIG.features, classes)

    def save(self, path):
        tensors = {f"w_a_{i:03d}": x.weight.detach() for i, x in enumerate(self.w_as)}
        tensors |= {f"w_b_{i:03d}": x.weight.detach() for i, x in enumerate(self.w_bs)}
        head = self.head
        name = f"fc_{head.in_features}in_{head.out_features}out"
        save_file(tensors | {name: head.weight.detach()}, path)

    def features(self, vit, images):
        """By weights changed one by one."""
        d = CONFIG.width
        state = {k: v.clone() for k, v in vit.state_dict().items()}
        for i, (a, b) in enumerate(zip(self.w_as, self.w_bs, strict=True)):
            rows = slice(0, d) if i % 2 == 0 else slice(2 * d, 3 * d)
            state[f"blocks.{i // 2}.qkv.weight"][rows] += (b.weight @ a.weight).detach()
        changed = ViT(CONFIG)
        changed.load_state_dict(state)
        return changed(images)


def test_release_matches_and_keeps_its_head(vit, images, tmp_path):
    torch.manual_seed(0)
    released = ReleasedLoRA()
    released.save(tmp_path / "lora_1.safetensors")
    lora = LoRA.load(tmp_path / "lora_1.safetensors").fit(CONFIG)
    assert (lora.rank, lora.name, set(lora.a)) == (4, "lora_1", {"q", "v"})
    assert lora.head.bias is None  # the release does not write it
    assert torch.equal(lora.head.weight, released.head.weight)
    torch.testing.assert_close(vit(images, lora), released.features(vit, images), **TOLERANCE)


def test_release_of_fewer_blocks_is_not_guessed_at(tmp_path):
    ReleasedLoRA(depth=6).save(tmp_path / "half.safetensors")
    lora = LoRA.load(tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match=r"half: made for 6 blocks, the backbone has 12"):
        lora.fit(CONFIG)


def test_bank_of_released_files(tmp_path):
    for i in (1, 2):
        ReleasedLoRA(classes=3 + i).save(tmp_path / f"lora_{i}.safetensors")
    torch.save([4, 7], tmp_path / "global_label_1.pth")  # beside them, and no LoRA
    bank = LoRABank.load(tmp_path)
    assert [x.name for x in bank] == ["lora_1", "lora_2"]
    assert [x.require_head().classes for x in bank] == [4, 5]
    average = LoRA.average(bank)
    average.save(tmp_path / "peft")  # and on as PEFT, for the same model
    again = LoRA.load(tmp_path / "peft")
    assert again.layout == "hf_clip"
    torch.testing.assert_close(again.delta("v"), average.delta("v"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("w_b_003"), "without gaps, got 24 of a and 23 of b"),
        (lambda t: (t.pop("w_a_023"), t.pop("w_b_023")), "even number of pairs"),
        (lambda t: t.update({"w_a_addition": torch.zeros(2, 2)}), "unknown tensors w_a_addition"),
        (lambda t: t.update({"fc_8in_5out": torch.zeros(4, 8)}), r"fc_8in_5out has shape \(4, 8\)"),
        (lambda t: t["w_a_000"].fill_(math.nan), "w_a_000 holds NaN"),
        (lambda t: t.update({"w_a_000": torch.zeros(2, 24)}), "expected one shape"),
        (lambda t: t.update({"w_a_000": torch.zeros(4)}), "w_a_000 must be a matrix"),
        (lambda t: (t.clear(), t.update({"x": torch.zeros(1)})), "expected LoRA Recycle's w_a_000"),
    ],
)
def test_damaged_releases_are_refused(change, message, tmp_path):
    tensors = {f"w_{x}_{i:03d}": torch.zeros((4, 24) if x == "a" else (24, 4))
               for i in range(24) for x in "ab"}  # fmt: skip
    tensors["fc_8in_5out"] = torch.zeros(5, 8)
    change(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        LoRA.load(tmp_path / "x.safetensors")


def test_info_describes_the_files(tmp_path):
    ReleasedLoRA().save(tmp_path / "lora_1.safetensors")
    torch.save(clip_lora(12), tmp_path / "clip.pt")
    for name, line in (
        ("lora_1.safetensors", "head: 5 classes"),
        ("clip.pt", "q: 24 -> 24, rank 2"),
    ):
        found = describe(str(tmp_path / name))
        assert found.problems == []
        assert any(line in text for text in found.lines)


# ------------------------------------------------------------------ CLIP-LoRA


def clip_lora(layers, params=("q", "k", "v"), width=24, rank=2, alpha=1, position="all",
              encoder="vision"):  # fmt: skip
    """What CLIP-LoRA's save_lora writes."""
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "proj"}
    weights = {
        f"layer_{i}": {
            names[p]: {
                "w_lora_A": randn(rank, width, seed=10 * i + j),
                "w_lora_B": randn(width, rank, seed=1000 + 10 * i + j),
            }
            for j, p in enumerate(params)
        }
        for i in range(layers)
    }
    metadata = {
        "r": rank, "alpha": alpha, "encoder": encoder, "params": list(params), "position": position
    }  # fmt: skip
    return {"weights": weights, "metadata": metadata}


def by_hand(vit, content, blocks, first=0):
    d, metadata = CONFIG.width, content["metadata"]
    scale = metadata["alpha"] / math.sqrt(metadata["r"])
    state = {k: v.clone() for k, v in vit.state_dict().items()}
    for i, block in enumerate(blocks):
        for name, pair in content["weights"][f"layer_{first + i}"].items():
            change = scale * pair["w_lora_B"] @ pair["w_lora_A"]
            if name == "proj":
                state[f"blocks.{block}.proj.weight"] += change
            else:
                start = ("q_proj", "k_proj", "v_proj").index(name) * d
                state[f"blocks.{block}.qkv.weight"][start : start + d] += change
    changed = ViT(CONFIG)
    changed.load_state_dict(state)
    return changed


@pytest.mark.parametrize("params", [("q", "k", "v"), ("q", "v", "o")])
@pytest.mark.parametrize(
    ("position", "blocks"), [("all", range(12)), ("half-up", range(6, 12)), ("top3", (9, 10, 11))]
)
def test_clip_lora_matches(params, position, blocks, vit, images, tmp_path):
    content = clip_lora(len(blocks), params, position=position, alpha=3)
    torch.save(content, tmp_path / "lora_weights.pt")
    lora = LoRA.load(tmp_path / "lora_weights.pt").fit(CONFIG)
    assert lora.head is None
    lora.save(tmp_path / "peft")
    assert LoRA.load(tmp_path / "peft").layout == "open_clip"
    torch.testing.assert_close(
        vit(images, lora), by_hand(vit, content, blocks)(images), **TOLERANCE
    )
    assert not torch.allclose(vit(images, lora), vit(images), atol=1e-4)


def test_clip_lora_on_both_towers_gives_the_image_towers(vit, images, tmp_path):
    content = clip_lora(24, encoder="both")
    text = clip_lora(12, width=16)["weights"]
    content["weights"] |= text  # the text tower's come first, of another width
    torch.save(content, tmp_path / "both.pt")
    lora = LoRA.load(tmp_path / "both.pt").fit(CONFIG)
    expected = by_hand(vit, content, range(12), first=12)(images)
    torch.testing.assert_close(vit(images, lora), expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["metadata"].update(encoder="text"), "encoder vision or both.*'text'"),
        (lambda c: c["metadata"].update(position="odd"), "a position of top1, .*KeyError: 'odd'"),
        (lambda c: c["metadata"].update(position="top3"), "has 3 blocks in the image tower"),
        (lambda c: c["metadata"].update(r=3), "metadata says rank 3"),
        (lambda c: c["metadata"].pop("alpha"), "KeyError: 'alpha'"),
        (lambda c: c["weights"].pop("layer_0"), "KeyError: 'layer_0'"),
        (lambda c: c["weights"]["layer_0"].update(mlp={}), "w_lora_A and w_lora_B of .*got mlp"),
        (lambda c: c["weights"]["layer_0"]["q_proj"]["w_lora_A"].fill_(math.inf), "infinity"),
    ],
)
def test_damaged_clip_loras_are_refused(change, message, tmp_path):
    content = clip_lora(12)
    change(content)
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        LoRA.load(tmp_path / "x.pt")


class Bomb:
    def __reduce__(self):
        return print, ("boom",)


def test_pickles_are_never_run(tmp_path, capsys):
    torch.save({"weights": Bomb(), "metadata": {}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="weights_only=True"):
        LoRA.load(tmp_path / "x.pt")
    assert "boom" not in capsys.readouterr().out


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x.bin").touch()
    with pytest.raises(ValueError, match=r"expected one of \.safetensors, \.pt, \.pth"):
        LoRA.load(tmp_path / "x.bin")
    with pytest.raises(FileNotFoundError):
        LoRA.load(tmp_path / "absent.pt")
