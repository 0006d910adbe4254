"""Subject sizes by a small CLIPSeg with random weights, against its logits one by one; phrases as in the study."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from clip_lens.data.read import read_pairs

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "subject_size.py"
SPEC = importlib.util.spec_from_file_location("subject_size", SCRIPT)
subject_size = importlib.util.module_from_spec(SPEC)
sys.modules["subject_size"] = subject_size  # dataclasses look their module up
SPEC.loader.exec_module(subject_size)

ROWS = [
    ("a", "There is a dog.", "There is no dog.", "1.png"),
    ("b", "There is a cat.", "There is no cat.", "1.png"),
    ("c", "There are some red cars.", "There are no red cars.", "2.png"),
    ("d", "There is a dog in view.", "There is no dog in view.", "2.png"),
    ("e", "Dogs on grass.", "No dogs on grass.", "2.png"),
    ("f", "There is a dog.", "There is no dog.", "absent.png"),
    ("g", "There is a dog.", "There is no dog.", "broken.png"),
    ("h", "There is a hippopotamus.", "There is no hippopotamus.", "1.png"),
    ("i", "There is a dog lying there.", "There is no dog lying there.", "1.png"),
    ("j", "There are dogs.", "There are no dogs.", "2.png"),
    ("k", "There is no dog.", "There is a dog.", "1.png"),
    ("l", "A cube and a ball.", "A ball and a cone.", "2.png"),
]
PHRASES = {"a": "a dog", "b": "a cat", "c": "some red cars", "d": "a dog", "i": "a dog", "j": "dogs"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The directory of a model with 4 layers of width 16 on 32 x 32 pixels, whose tokens are characters."""
    from transformers import (
        CLIPSegConfig,
        CLIPSegForImageSegmentation,
        CLIPSegProcessor,
        CLIPTokenizer,
        ViTImageProcessor,
    )

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    text = tower | {"vocab_size": 200, "num_hidden_layers": 2, "max_position_embeddings": 14}
    config = CLIPSegConfig(
        text_config=text | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
        vision_config=tower | {"num_hidden_layers": 4, "image_size": 32, "patch_size": 8},
        **{"projection_dim": 16, "extract_layers": [1, 2, 3], "reduce_dim": 8},
        **{"decoder_num_attention_heads": 2, "decoder_intermediate_size": 16},
    )
    torch.manual_seed(0)
    made = CLIPSegForImageSegmentation(config)
    for name, parameter in made.named_parameters():  # large enough for phrases and pictures to matter
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=3.0 if "film" in name else 0.5)
    letters = [chr(code) for code in range(33, 127)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[])
    images = ViTImageProcessor(size={"height": 32, "width": 32})
    folder = tmp_path_factory.mktemp("clipseg")
    CLIPSegProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path):
    """A file of pairs and a folder of images, one of them broken and one absent."""
    pd.DataFrame(ROWS, columns=["key", "caption", "foil", "image"]).to_csv(tmp_path / "pairs.csv", index=False)
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for name, shape in (("1.png", (40, 50, 3)), ("2.png", (64, 32, 3))):
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / "images" / name)
    (tmp_path / "images" / "broken.png").write_bytes(b"no picture")
    return tmp_path


def run(capsys, files, model, *more, out="out.csv"):
    arguments = [files / "pairs.csv", files / "images", "--out", files / out, "--model", model, *more]
    code = subject_size.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def by_hand(model, folder, threshold):
    """Mean probability and share above of each pair's picture, from the logits of one picture and phrase at a time."""
    from transformers import CLIPSegForImageSegmentation, CLIPTokenizer, ViTImageProcessor

    net, tokenizer = CLIPSegForImageSegmentation.from_pretrained(model).eval(), CLIPTokenizer.from_pretrained(model)
    processor = ViTImageProcessor.from_pretrained(model)
    images = {key: image for key, *_, image in ROWS}
    means, shares = {}, {}
    for key, phrase in PHRASES.items():
        picture = Image.open(folder / images[key]).convert("RGB")
        pixels = processor(picture, return_tensors="pt").pixel_values
        assert pixels.shape == (1, 3, 32, 32)
        with torch.no_grad():
            ids = torch.tensor([tokenizer(phrase)["input_ids"]])
            logits = net(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits
        logits = logits.flatten().double().numpy()
        means[key] = np.mean(1 / (1 + np.exp(-logits)))
        shares[key] = np.mean(logits > np.log(threshold / (1 - threshold)))
    return means, shares


@pytest.mark.parametrize("threshold", [None, 0.8])
def test_sizes_equal_those_counted_by_hand(capsys, files, model, threshold):
    """Without a threshold it is the study's, .25."""
    more = () if threshold is None else ("--threshold", threshold)
    code, said, errors = run(capsys, files, model, *more, "--batch-size", 3)
    assert code == 0
    assert "6 of 10 pairs with the negation in the foil have a size; not defined for the 2 others" in said
    means, shares = by_hand(model, files / "images", threshold or 0.25)
    found = read_pairs(files / "out.csv").to_frame().set_index("key")
    assert found.subject_size.dropna().to_dict() == pytest.approx(means, abs=1e-5)
    assert found.subject_size_above.dropna().to_dict() == pytest.approx(shares, abs=1.5 / 32**2)  # one on the edge
    assert found.subject_phrase.dropna().to_dict() == PHRASES
    assert len({round(size, 4) for size in means.values()}) >= 4  # far more apart than 1e-5
    assert len({round(size, 3) for size in shares.values()}) >= 3 and 0 < max(shares.values()) < 1
    reasons = {
        "e": "no subject",
        "f": "no image",
        "g": "can't read",
        "h": "the subject 'a hippopotamus' has more tokens",
    }
    for (key, reason), line in zip(reasons.items(), errors.splitlines(), strict=True):
        assert line.startswith(f"no size for {key}: {reason}")
    assert sorted(path.name for path in files.iterdir()) == ["images", "out.csv", "pairs.csv"]


def test_the_phrase_of_the_pairs_goes_first(capsys, files, model):
    frame = pd.read_csv(files / "pairs.csv").assign(subject=["animal", *[None] * 11])
    frame.to_csv(files / "pairs.csv", index=False)
    assert run(capsys, files, model)[0] == 0
    assert pd.read_csv(files / "out.csv").subject_phrase.tolist()[:2] == ["animal", "a cat"]


@pytest.mark.parametrize(
    ("caption", "phrase"),
    [
        ("There are some old men.", "some old men"),
        ("There are some different fruits and veggies.", "some different fruits"),
        ("There is a walking sign shown.", "a walking sign"),
        ("There are people.", "people"),
        ("A man holds the red ball.", "A man holds"),  # verbs that are no participles are not told from nouns
        ("In the picture there is a cube.", "the picture"),
        ("Nobody is here.", None),
        ("There are.", None),
    ],
)
def test_first_noun_chunks(caption, phrase):
    assert subject_size.first_noun_chunk(caption) == phrase


def test_noun_chunks_are_the_studys(shared):
    """The study's are spaCy's. It has none for four captions, whose nouns that tagger took for verbs."""
    published = json.loads((shared / "data" / "clip-localisation" / "pairs.json").read_text()).values()
    items = [item for item in published if item["negation"] == "foil"]
    equal = [subject_size.first_noun_chunk(item["caption"]) == item["subject"] for item in items if item["subject"]]
    assert (len(items), len(equal), sum(equal)) == (240, 236, 234)


def test_without_negation_in_a_foil_there_is_nothing_to_do(capsys, files, model):
    frame = pd.read_csv(files / "pairs.csv").tail(2)
    frame.to_csv(files / "pairs.csv", index=False)
    code, _, errors = run(capsys, files, model)
    assert code == 1 and "none of 2 pairs has a size, the first: a size is defined for negation in the foil" in errors


def test_what_comes_out_are_the_pairs_that_went_in(capsys, files, model):
    assert run(capsys, files, model)[0] == 0
    before, after = read_pairs(files / "pairs.csv"), read_pairs(files / "out.csv")
    for name in ("key", "caption", "foil", "image", "side"):
        assert getattr(before, name) == getattr(after, name)


def test_a_run_that_was_interrupted_goes_on(capsys, files, model, monkeypatch):
    run(capsys, files, model, out="whole.csv")
    calls, call = [], subject_size.Segmenter.__call__

    def counted(self, pictures, phrases):
        calls.append(len(phrases))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return call(self, pictures, phrases)

    monkeypatch.setattr(subject_size.Segmenter, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        run(capsys, files, model, "--batch-size", 2)
    rest = files / "out.csv.partial.jsonl"
    assert len(rest.read_text().splitlines()) == 3 and not (files / "out.csv").exists()  # settings and two
    with rest.open("a") as file:
        file.write('{"image": "2.png", "sub')  # as a crash would leave it
    assert run(capsys, files, model, "--batch-size", 2)[0] == 0
    assert sum(calls[2:]) == 3 and not rest.exists()  # of five different questions two were answered
    left, right = (pd.read_csv(files / name).subject_size for name in ("out.csv", "whole.csv"))
    pd.testing.assert_series_equal(left, right)


def test_the_rest_of_a_run_with_other_settings_is_refused(capsys, files, model):
    (files / "out.csv.partial.jsonl").write_text(json.dumps({"model": "other", "threshold": 0.5}) + "\n")
    code, _, errors = run(capsys, files, model)
    assert code == 1 and "--overwrite" in errors and not (files / "out.csv").exists()
    assert run(capsys, files, model, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("prepare", "more", "message"),
    [
        (lambda files: (files / "out.csv").write_text("mine"), (), "is there already"),
        (lambda files: None, ("--threshold", 1), "between 0 and 1"),
        (lambda files: None, ("--model", "/no/such/model"), "can't load '/no/such/model'"),
        (lambda files: [file.unlink() for file in (files / "images").iterdir()], (), "none of 12 pairs has a size"),
        (lambda files: (files / "images").rename(files / "other"), (), "there is no folder"),
        (lambda files: (files / "pairs.csv").unlink(), (), "does not exist"),
    ],
)
def test_what_is_in_the_way_is_said_and_nothing_is_written(capsys, files, model, prepare, more, message):
    prepare(files)
    code, _, errors = run(capsys, files, model, *more)
    assert code == 1 and message in errors
    assert not (files / "out.csv").exists() or (files / "out.csv").read_text() == "mine"


def test_a_column_that_is_there_is_not_replaced_unasked(capsys, files, model):
    frame = pd.read_csv(files / "pairs.csv").assign(subject_size=0.5)
    frame.to_csv(files / "pairs.csv", index=False)
    code, _, errors = run(capsys, files, model)
    assert code == 1 and "has a column subject_size already" in errors
    assert run(capsys, files, model, "--overwrite")[0] == 0
    assert (pd.read_csv(files / "out.csv").subject_size.dropna() != 0.5).any()


def test_pairs_that_were_dropped_are_counted(capsys, files, model):
    with (files / "pairs.csv").open("a") as file:
        file.write("m,,There is a dog.,1.png\n")
    assert "1 more were dropped" in run(capsys, files, model)[1]
