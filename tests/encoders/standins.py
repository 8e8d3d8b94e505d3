"""Small random networks with the input contracts of the files that cannot be had here, scripted and saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Width, classes and side of the spatial map of the Inception stand-in.
WIDTH, CLASSES, SIDE = 24, 11, 7
#: Of a transformer in a transformers folder.
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


class _Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(12, 16, 1), nn.ReLU())
        self.tower = nn.Sequential(nn.Conv2d(12, WIDTH - 16, 3, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.conv(x), self.tower(x)), dim=1)


class Inception(nn.Module):
    """What the TorchScript Inception of FID promises: its arguments, its own resizing, the names of its parts."""

    def __init__(self, middle: float = 128.0) -> None:
        super().__init__()
        self.middle = middle
        self.layers = nn.Sequential()
        self.layers.add_module("conv", nn.Conv2d(3, 12, 40, stride=40))
        self.layers.add_module("mixed_6", _Mixed())
        self.layers.add_module("pool2", nn.AdaptiveAvgPool2d(1))
        self.output = nn.Linear(WIDTH, CLASSES)

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        n, _, height, width = img.shape
        x = img.to(torch.float32)
        # source pixel of output pixel i is i * size / 299, edges repeated: TensorFlow 1's bilinear resize
        rows = torch.arange(299, device=x.device) * (height / 299)
        columns = torch.arange(299, device=x.device) * (width / 299)
        top, left = rows.floor().long(), columns.floor().long()
        bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
        down, across = (rows - top)[:, None], columns - left
        upper = x[:, :, top][:, :, :, left] * (1 - across) + x[:, :, top][:, :, :, right] * across
        lower = x[:, :, bottom][:, :, :, left] * (1 - across) + x[:, :, bottom][:, :, :, right] * across
        x = (upper * (1 - down) + lower * down - self.middle) / self.middle
        features = self.layers(x).reshape(n, -1)
        if return_features:
            return features
        bias = None if no_output_bias else self.output.bias
        return F.linear(features, self.output.weight, bias).softmax(dim=1)


class I3d(nn.Module):
    """What the TorchScript I3D of FVD promises: float ``(b, 3, t, h, w)`` in 0..255 and three switches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 8, (3, 32, 32), stride=(2, 32, 32))
        self.logits = nn.Linear(8, 400)

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        if rescale:
            x = 2 * x / 255 - 1
        if resize:
            x = F.interpolate(x, size=[x.shape[2], 224, 224], mode="trilinear", align_corners=False)
        logits = self.logits(self.conv(x).relu().mean(dim=[2, 3, 4]))
        return logits if return_features else logits.softmax(dim=1)


def save(network: nn.Module, path: Path) -> nn.Module:
    """Give a network random weights, script and save it; return the plain one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
    torch.jit.save(torch.jit.script(network.eval()), str(path))
    return network


def save_folder(network: Any, folder: Path, **preprocessor: Any) -> Any:
    """Give a network of transformers random weights and save its folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.2)
    network.eval().save_pretrained(folder)
    if preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return network


def save_clip(folder: Path) -> Any:
    """Save the folder of a CLIP with random weights that knows six words and reads captions of five tokens."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    words = ["<pad>", "<end>", "a", "red", "blue", "box"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>"
    ).save_pretrained(folder)
    config = transformers.CLIPConfig(
        text_config={**SIZES, "vocab_size": 6, "max_position_embeddings": 5, "eos_token_id": 1, "pad_token_id": 0},
        vision_config={**SIZES, "image_size": 32, "patch_size": 16},
        projection_dim=12,
    )
    network = save_folder(transformers.CLIPModel(config), folder)
    # As drawn, all pictures and captions point away from each other, which a CLIP score counts as 0.
    network.text_projection.weight.data.neg_()
    network.save_pretrained(folder)
    return network
