"""The merge file against open_clip's own tokenizer, and folders that it reads without our code."""

import gzip
import json

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file

import common
from support import pretrain_tiny_clip, tiny_words
from support.tiny_world import TINY_VOCABULARY


@pytest.fixture
def folder(tmp_path):
    """A small CLIP as pretraining writes it, with random weights."""
    folder = tmp_path / "clip"
    folder.mkdir()
    tiny_words.write_merges(folder, TINY_VOCABULARY)
    merges = tiny_words.learn_merges(TINY_VOCABULARY)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2},
        "text_cfg": {"context_length": 12, "width": 16, "heads": 2, "layers": 1},
    }
    config["vision_cfg"]["head_width"] = 8
    config["text_cfg"]["vocab_size"] = tiny_words.BYTES + len(merges) + tiny_words.SPECIAL
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    whole = {"model_cfg": config, "preprocess_cfg": pretrain_tiny_clip.PREPROCESS_CONFIG}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    return folder


def test_every_word_is_one_token(folder):
    tokenizer = SimpleTokenizer(str(folder / tiny_words.FILE), context_length=12)
    merges = tiny_words.learn_merges(TINY_VOCABULARY)
    assert tokenizer.vocab_size == 512 + len(merges) + 2
    seen = set()
    for word in TINY_VOCABULARY:
        (token,) = tokenizer.encode(word)
        assert tokenizer.decode([token]) == f"{word} "
        seen.add(token)
    assert len(seen) == len(TINY_VOCABULARY)
    assert tokenizer.encode("a dog.") == [
        *tokenizer.encode("a"),
        *tokenizer.encode("dog"),
        256 + 13,
    ]


def test_merges_are_applied_as_open_clip_does(folder):
    """Also to words that were not listed."""
    tokenizer = SimpleTokenizer(str(folder / tiny_words.FILE), context_length=12)
    merges = tiny_words.learn_merges(TINY_VOCABULARY)
    rng = np.random.default_rng(0)
    letters = list("abdegoprst")
    words = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(200)]
    for word in [*words, *TINY_VOCABULARY]:
        if len(word) > 1:
            assert " ".join(tiny_words.apply_merges(word, merges)) == tokenizer.bpe(word)


def test_the_merge_file_is_the_same_bytes_every_time(folder, tmp_path):
    tiny_words.write_merges(tmp_path, TINY_VOCABULARY)
    written = (tmp_path / tiny_words.FILE).read_bytes()
    assert written == (folder / tiny_words.FILE).read_bytes()
    assert gzip.decompress(written).decode().splitlines()[0].split() == list(TINY_VOCABULARY)


def test_what_it_never_saw_is_refused_by_name(folder):
    tokenizer = common.load_clip(f"local-dir:{folder}").tokenizer
    assert tokenizer("A photo of a dog.").shape == (1, 12)
    with pytest.raises(common.InputError, match="'zebra'.*it knows: a, an, "):
        tokenizer(["a dog", "a photo of a zebra."])
    tokenizer("a " * 10)  # and start and end
    with pytest.raises(common.InputError, match="11 tokens, the tiny CLIP reads at most 10"):
        tokenizer("a " * 11)


def test_an_export_is_whole_for_open_clip_alone(folder, tmp_path):
    """Same tokens, text features and image features with none of our code."""
    clip = common.load_clip(f"local-dir:{folder}")
    classes = ("dog", "house")
    common.export_clip(clip, tmp_path / "export", clip.class_features(classes), classes)
    name = f"local-dir:{tmp_path / 'export'}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    merges = tmp_path / "export" / "merges.txt.gz"
    tokenizer = open_clip.get_tokenizer(name, bpe_path=str(merges))
    texts = [f"a photo of a {name}." for name in classes]
    assert torch.equal(tokenizer(texts), clip.tokenizer(texts))
    model.eval()
    with torch.no_grad():
        features = model.encode_text(tokenizer(texts), normalize=True)
        assert torch.allclose(features, clip.class_features(classes), atol=1e-6)
        pixels = torch.randn(3, 3, 32, 32)
        assert torch.allclose(model.visual(pixels), clip.visual(pixels), atol=1e-6)
    again = common.load_clip(name)
    assert torch.equal(again.class_features(classes), clip.class_features(classes))


def test_ensemble_holds_the_templates_it_can_read(folder):
    ours = common.load_clip("tiny").ensemble()
    assert common.load_clip(f"local-dir:{folder}").ensemble() == ours
    assert "a photo of a {}." in ours and 5 < len(ours) < 40


def test_words_of_coop_stand_behind_the_start_token(folder):
    tokenizer = common.load_clip(f"local-dir:{folder}").tokenizer
    assert common.first_word(tokenizer) == 1
    assert common.first_word(common.load_clip("tiny").tokenizer) == 0


def test_usual_places_and_media_are_as_frequent_as_asked():
    """Things stand in their place by chance too; in another medium they are rarer."""
    count, place, odds = 1600, 0.55, 4
    share = {"photo": 0.5, "sketch": 0.5}
    arguments = count, 3, share, place, odds
    _, attributes = pretrain_tiny_clip.draw_corpus(*arguments)
    usual = [pretrain_tiny_clip.USUAL_PLACE[thing] == ground for _, _, thing, ground in attributes]
    expected = place + (1 - place) / 8
    assert abs(np.mean(usual) - expected) < 4 * np.sqrt(expected * (1 - expected) / count)
    own = [pretrain_tiny_clip.USUAL_MEDIUM[thing] == domain for domain, _, thing, _ in attributes]
    shares = []
    for domain in share:
        media = list(pretrain_tiny_clip.USUAL_MEDIUM.values())
        shares.append(
            odds * media.count(domain) / (odds * media.count(domain) + 18 - media.count(domain))
        )
    expected = np.mean(shares)
    assert abs(np.mean(own) - expected) < 4 * np.sqrt(expected * (1 - expected) / count)


def test_a_usual_place_is_never_that_of_a_cue():
    """What pretraining pairs is not what a tiny set pairs: see `draw_domain`."""
    kinds = list(pretrain_tiny_clip.BACKGROUNDS)
    for classes, *_ in common.TINY_BENCHMARKS.values():
        for label, name in enumerate(classes):
            assert pretrain_tiny_clip.USUAL_PLACE[name] != kinds[label % len(kinds)]
