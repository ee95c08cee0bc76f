"""The scripts in assets/ that write class features and captions."""

import importlib
import json

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import call
from PIL import Image


@pytest.fixture
def promptstyler(root, monkeypatch):
    monkeypatch.syspath_prepend(root / "support")  # as when it is run as a script
    return importlib.import_module("promptstyler")


@pytest.fixture
def caption(root, monkeypatch):
    monkeypatch.syspath_prepend(root / "support")
    return importlib.import_module("caption")


# ---------- PromptStyler -------------------------------------------------------------------------
def test_style_loss_by_a_loop(promptstyler):
    generator = torch.Generator().manual_seed(7)

    def unit(*shape):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return F.normalize(x, dim=-1)

    style, styled, content, earlier = unit(6), unit(3, 6), unit(3, 6), unit(2, 6)
    diversity = sum(abs(float(e @ style)) for e in earlier) / 2
    consistency = 0.0
    for m in range(3):
        scores = [np.exp(float(styled[m] @ content[n])) for n in range(3)]
        consistency -= np.log(scores[m] / sum(scores)) / 3
    loss = promptstyler.style_loss(style, styled, content, earlier)
    assert loss.item() == pytest.approx(diversity + consistency)
    first = promptstyler.style_loss(style, styled, content, earlier[:0])
    assert first.item() == pytest.approx(consistency)


NAMES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")


def test_promptstyler_stays_near_the_zero_shot_classifier(promptstyler):
    """It has never met an image; its features are nearest to the text of their own class."""
    model, tokenizer = promptstyler.load_clip("tiny", "openai", "cpu")
    features = promptstyler.promptstyler(model, tokenizer, NAMES, seed=0, steps=5)
    assert features.shape == (7, 64)
    assert torch.allclose(features.norm(dim=-1), torch.ones(7))
    again = promptstyler.promptstyler(model, tokenizer, NAMES, seed=0, steps=5)
    assert torch.equal(features, again)
    texts = model.encode_text(tokenizer([f"a photo of a {name}." for name in NAMES]))
    assert (features @ texts.T).argmax(1).tolist() == list(range(7))


def test_promptstyler_says_what_is_wrong(root, tmp_path):
    wrong = call([root / "support" / "promptstyler.py", "--classes", "zebra"], tmp_path)
    assert wrong.returncode == 2
    assert "does not know the word 'zebra'" in wrong.stderr
    assert "Traceback" not in wrong.stderr


# ---------- CoCa ---------------------------------------------------------------------------------
TEXT = {"context_length": 32, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2}
TOWER = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
COCA = {
    "embed_dim": 32,
    "multimodal_cfg": TEXT,
    "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    "vision_cfg": {
        **TOWER,
        "output_tokens": True,
        "attentional_pool": True,
        "attn_pooler_heads": 2,
    },
}


@pytest.fixture
def small_coca():
    torch.manual_seed(0)
    model = open_clip.CoCa(**COCA).eval().requires_grad_(False)
    # open_clip leaves this one as it finds the memory
    torch.nn.init.normal_(model.text_decoder.text_projection)
    for parameter in model.text_decoder.parameters():
        parameter.data *= 4  # so that images matter for the words
    return model


def likeliest_word(model, image, words):
    logits = model(image[None], torch.tensor([words]), output_labels=False)["logits"]
    return logits[0, -1].argmax().item()


def test_greedy_captions_are_those_of_one_image_and_one_word_at_a_time(caption, small_coca):
    images, lengths = 3 * torch.randn(6, 3, 32, 32), set()
    first = likeliest_word(small_coca, images[0], [38])
    for end in (39, first):  # an end that hardly comes, and one that comes at once for some
        tokens = caption.greedy_captions(small_coca, images, 38, end, length=9)
        assert tokens.shape == (6, 9)
        for image, line in zip(images, tokens.tolist()):
            words = [38]
            while len(words) < 8 and words[-1] != end:
                words.append(likeliest_word(small_coca, image, words))
            assert line == words + [end] * (9 - len(words))
            lengths.add(len(words))
    assert len(lengths) > 1


class Words:
    """A tokenizer of 40 tokens."""

    sot_token_id, eot_token_id = 38, 39

    @staticmethod
    def decode(tokens):
        return " ".join(f"w{token}" for token in tokens)


def test_caption_writes_a_file_for_ldfs(caption, small_coca, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for name in ("b/1.png", "a/2.JPG", "a/1.png"):
        file = tmp_path / "data" / "PACS" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(file)
    (tmp_path / "data" / "PACS" / "notes.txt").write_text("no image")
    preprocess = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(size=32), is_train=False
    )
    loaded = []

    def load_coca(*arguments):
        loaded.append(arguments)
        return small_coca, preprocess, Words

    monkeypatch.setattr(caption, "load_coca", load_coca)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["caption.py", "data/PACS"])
    caption.main()
    assert loaded == [("coca_ViT-L-14", "mscoco_finetuned_laion2b_s13b_b90k", "cpu")]
    captions = json.loads((tmp_path / "captions.json").read_text())
    assert list(captions) == ["PACS/a/1.png", "PACS/a/2.JPG", "PACS/b/1.png"]
    for text in captions.values():
        words = text.split()
        assert words and all(word.startswith("w") for word in words)
        assert "w38" not in words and "w39" not in words


WRONG = [
    (["nowhere"], "no image below nowhere"),
    (["pictures"], "pictures is not below --data-root data"),
    (["pictures", "--data-root", ".", "--pretrained", "opneai"], "opneai"),
]


@pytest.mark.parametrize("arguments, message", WRONG)
def test_caption_says_what_is_wrong(caption, tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "one.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["caption.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        caption.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_clip_that_writes_no_captions_is_refused(caption, root):
    with pytest.raises(caption.InputError, match="writes no captions"):
        caption.load_coca(f"local-dir:{root / 'assets' / 'tiny_clip'}", None, "cpu")
