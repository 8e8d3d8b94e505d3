"""Several text encoders behind one another: each is embedded by weights of its own, found by the tokens' places."""

import pytest
import torch

from ltd.config import ConfigError
from ltd.denoisers import Conditioning, DitConfig
from ltd.nn.embed import TextEmbedding, TextPartsEmbedding

PARTS = ((1, 3), (3, 5))


def test_each_encoder_has_its_own_embedding():
    torch.manual_seed(0)
    layer = TextPartsEmbedding(PARTS, 8)
    text = torch.randn(2, 4, 5)
    text[:, :1, 3:] = torch.nan  # beyond the narrow encoder's channels: never read
    first, second = layer.embeddings
    expected = torch.cat([first(text[:, :1, :3]), second(text[:, 1:])], dim=1)
    assert torch.equal(layer(text), expected) and layer.num_tokens == 4 and layer.text_dim == 5
    assert [(part.text_dim, part.input.in_features) for part in layer.embeddings] == [(3, 3), (5, 5)]


def test_one_part_is_one_encoder(build, inputs):
    x_t, t, cond = inputs
    plain, parts = build(text_dim=5), build(text_dim=5, text_parts=((4, 5),))
    names = {name: name.replace("text_embedding.", "text_embedding.embeddings.0.") for name in plain.state_dict()}
    parts.load_state_dict({names[name]: value for name, value in plain.state_dict().items()})
    assert torch.equal(parts(x_t, t, cond), plain(x_t, t, cond))


def test_padding_of_any_encoder_is_never_read(build, inputs):
    x_t, t, cond = inputs
    model = build(text_dim=5, text_parts=PARTS, pooled_text=True)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)
    cond = Conditioning(text=cond.text, text_mask=mask)
    filled = Conditioning(text=torch.where(mask[..., None], cond.text, 9.0), text_mask=mask)
    assert torch.allclose(model(x_t, t, cond), model(x_t, t, filled), rtol=0, atol=1e-12)
    # the same tokens in the other encoder's stretch are something else
    moved = Conditioning(text=cond.text[:, [1, 0, 2, 3]], text_mask=mask[:, [1, 0, 2, 3]])
    assert (model(x_t, t, cond) - model(x_t, t, moved)).abs().max() > 1e-3
    assert torch.equal(model(x_t, t, None), model(x_t, t, Conditioning(cond.text, torch.zeros_like(mask))))


def test_texts_of_another_length_are_refused(build, inputs):
    x_t, t, cond = inputs
    with pytest.raises(ValueError, match=r"text: got 4 tokens, needed 5: those of all model.text_parts"):
        build(text_dim=5, text_parts=((2, 3), (3, 5)))(x_t, t, cond)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_dim": 4, "text_parts": PARTS}, r"text_parts: got .* for text_dim = 4; .* text_dim: 5, the widest"),
        ({"text_dim": 5, "text_parts": ((0, 5),)}, "needed 1 token and channel or more"),
        ({"text_dim": 5, "text_parts": PARTS, "text_length": 6}, "cannot be combined with text_length"),
    ],
)
def test_parts_that_do_not_fit(options, message):
    with pytest.raises(ConfigError, match=message):
        DitConfig(**options)


def test_a_single_embedding_stays_what_it_was(build):
    assert isinstance(build(text_dim=5).text_embedding, TextEmbedding)
