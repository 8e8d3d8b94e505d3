import json

import numpy as np
import pytest
import torch

from ltd.config import ConfigError
from ltd.encoders.features import CaptionFeatures, build_features
from ltd.encoders.pretrained import TransformersFeaturesConfig
from tests.encoders.standins import SIZES, save_clip, save_folder

transformers = pytest.importorskip("transformers")


def _clips(b: int = 2, t: int = 4, h: int = 50, w: int = 70) -> torch.Tensor:
    return torch.randint(0, 256, (b, t, h, w, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def _features(folder):
    return build_features(TransformersFeaturesConfig(path=str(folder)))


def _processed(processor, clips):
    """What transformers' own processor makes of all frames: ``(b * t, 3, size, size)``."""
    frames = [np.asarray(frame) for frame in clips.flatten(0, 1)]
    return torch.as_tensor(np.stack(processor(images=frames, return_tensors="np")["pixel_values"])).flatten(0, -4)


def _seen(features, clips):
    """What the network is given."""
    given = []
    handle = features._network.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["pixel_values"]), with_kwargs=True
    )
    features(clips)
    handle.remove()
    return torch.cat(given)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    config = transformers.Dinov2Config(**SIZES, image_size=28, patch_size=14)
    return folder, save_folder(transformers.Dinov2Model(config), folder)


def test_dinov2_gives_its_class_token_of_processed_frames(dinov2):
    folder, network = dinov2
    clips = _clips()
    processor = transformers.BitImageProcessorPil(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, resample=3, do_center_crop=True,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    pixels = _processed(processor, clips)
    features = _features(folder)
    seen = _seen(features, clips)
    assert torch.allclose(seen, pixels, atol=1e-6)
    with torch.no_grad():
        want = network(pixel_values=pixels).pooler_output.unflatten(0, (2, 4)).mean(dim=1)
    assert want.std() > 0.1
    assert torch.allclose(features(clips), want, atol=1e-5)
    assert features.dim == 16 and "dinov2, sha256" in features.name
    assert "shorter side to 256, middle 224x224" in features.preprocessing


def test_preprocessor_config_overrules_what_is_known(dinov2, tmp_path):
    config = transformers.Dinov2Config(**SIZES, image_size=28, patch_size=14)
    stated = {"size": {"height": 42, "width": 42}, "do_center_crop": False, "resample": 2}
    save_folder(transformers.Dinov2Model(config), tmp_path, **stated, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    clips, features = _clips(), _features(tmp_path)
    processor = transformers.BitImageProcessorPil(
        size={"height": 42, "width": 42}, do_center_crop=False, resample=2, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    seen, pixels = _seen(features, clips), _processed(processor, clips)
    assert torch.allclose(seen, pixels, atol=1e-6)
    assert "bilinear resize of the whole frame to 42x42" in features.preprocessing
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated | {"resample": 1}))
    with pytest.raises(ConfigError, match=r"asks for filter 1, needed 2 \(bilinear\) or 3 \(bicubic\)"):
        _features(tmp_path)


def test_videomae_gives_the_mean_of_its_tokens_of_16_frames(tmp_path):
    config = transformers.VideoMAEConfig(**SIZES, image_size=32, patch_size=16, num_frames=4, tubelet_size=2)
    network = save_folder(transformers.VideoMAEModel(config), tmp_path)
    clips, features = _clips(t=8), _features(tmp_path)
    chosen = clips[:, [1, 3, 5, 7]]
    processor = transformers.VideoMAEImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32},
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    pixels = _processed(processor, chosen).unflatten(0, (2, 4))
    with torch.no_grad():
        want = network(pixel_values=pixels).last_hidden_state.mean(dim=1)
    assert torch.allclose(features(clips), want, atol=1e-5) and want.std() > 0.05
    shuffled = features(clips[:, [3, 1, 2, 0, 4, 7, 6, 5]])
    assert not torch.allclose(shuffled, want, atol=5e-2)  # it sees the order of frames
    with pytest.raises(ValueError, match="clips of 3 frames: this network needs 4 or more"):
        features(clips[:, :3])


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return folder, save_clip(folder)


def test_clip_embeds_frames_and_captions_in_one_space(clip):
    folder, network = clip
    features, clips = _features(folder), _clips(t=1)
    assert isinstance(features, CaptionFeatures) and features.dim == 12
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    ids = torch.tensor([[2, 3, 5, 1, 0], [4, 1, 0, 0, 0]])
    with torch.no_grad():
        output = network(input_ids=ids, attention_mask=(ids != 0).long(), pixel_values=_processed(processor, clips))
    unit = torch.nn.functional.normalize
    assert torch.allclose(unit(features(clips)), output.image_embeds, atol=1e-5)
    assert torch.allclose(unit(features.embed_captions(["a red box", "blue"])), output.text_embeds, atol=1e-5)
    # longer captions are cut: their last token is still the end
    assert features.embed_captions(["a red box a blue box", "a red box a"]).isfinite().all()


def test_folders_that_do_not_do_are_refused(dinov2, tmp_path):
    with pytest.raises(ConfigError, match="path: no config.json in"):
        _features(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "hidden_size": 8}))
    with pytest.raises(ConfigError, match="holds a t5 network, needed beit, clip, deit, dinov2"):
        _features(tmp_path)
    assert not isinstance(_features(dinov2[0]), CaptionFeatures)
    (tmp_path / "config.json").write_text((dinov2[0] / "config.json").read_text())
    torch.save(dinov2[1].state_dict(), tmp_path / "pytorch_model.bin")  # a pickle alone
    with pytest.raises(ConfigError, match="does not load as a vision network"):
        _features(tmp_path)
