import io
import pickle
import sys

import numpy as np
import pytest
import sentencepiece
import torch

from rlinf.core.errors import DataError, MissingDependency
from rlinf.models.embodiment.openpi.tokenizer import (
    ByteTokenizer,
    SentencePieceTokenizer,
    clean,
    prompt_tokens,
    state_bins,
    tokenize,
)

TEXT = [
    "pick up the black bowl between the plate and the ramekin and place it on the plate",
    "Task: open the drawer, State: 12 200 0 255 31;\nAction: ",
]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A small sentencepiece model with PaliGemma's conventions: nothing is normalised, bos is 2, every byte known."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20),
        model_writer=buffer,
        vocab_size=340,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=["\n"],
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    file = tmp_path_factory.mktemp("tokenizer") / "paligemma_tokenizer.model"
    file.write_bytes(buffer.getvalue())
    return file


@pytest.fixture
def tokenizer(model_file):
    return SentencePieceTokenizer(model_file)


@pytest.fixture
def oracle(model_file):
    return sentencepiece.SentencePieceProcessor(model_file=str(model_file))


def test_pi0_reads_bos_text_and_a_line_break(tokenizer, oracle):
    expected = [2, *oracle.encode("open the middle drawer"), *oracle.encode("\n")]
    assert prompt_tokens(tokenizer, " open the_middle\ndrawer\n") == expected
    assert oracle.decode(expected[1:]) == "open the middle drawer\n"
    assert expected[1:-1] == oracle.encode("open the middle drawer", add_bos=True)[1:]


def test_pi05_reads_the_state_as_bins(tokenizer, oracle):
    state = torch.tensor([-1.0, 0.0, 0.999, 1.0, -1.5])
    tokens = prompt_tokens(tokenizer, "open the drawer", state)
    text = "Task: open the drawer, State: 0 128 255 255 -1;\nAction: "
    assert tokens == [2, *oracle.encode(text)]
    assert oracle.decode(tokens[1:]) == text


def test_bins_are_numpys():
    edges = np.linspace(-1, 1, 257)[:-1]
    state = np.concatenate([edges, edges - 1e-9, edges + 1e-9, np.random.default_rng(0).normal(size=1000)])
    expected = np.digitize(state, bins=edges) - 1
    assert np.array_equal(state_bins(torch.from_numpy(state)).numpy(), expected)


def test_clean():
    assert clean("  put_the bowl\non the plate \n") == "put the bowl on the plate"


def test_batches_are_padded_to_the_longest(tokenizer):
    prompts = ["open", "pick up the black bowl", "open"]
    tokens, mask = tokenize(tokenizer, prompts, max_len=48)
    rows = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    assert tokens.dtype is torch.int64 and mask.dtype is torch.bool
    assert tokens.shape[1] % 8 == 0 and tokens.shape[1] - max(map(len, rows)) < 8
    for row, numbers in enumerate(rows):
        assert tokens[row, mask[row]].tolist() == numbers
        assert mask[row].tolist() == [n < len(numbers) for n in range(tokens.shape[1])]
        assert not tokens[row, ~mask[row]].any()


def test_long_prompts_are_cut(tokenizer):
    tokens, mask = tokenize(tokenizer, [TEXT[0] * 9, "open"], max_len=12)
    assert tokens.shape == (2, 12) and mask[0].all()
    assert tokens[0].tolist() == prompt_tokens(tokenizer, TEXT[0] * 9)[:12]


def test_every_row_has_its_own_state(tokenizer):
    state = torch.tensor([[0.0, 0.5], [-1.0, 0.25]])
    tokens, mask = tokenize(tokenizer, ["open", "open"], state, max_len=200)
    for row in range(2):
        assert tokens[row, mask[row]].tolist() == prompt_tokens(tokenizer, "open", state[row])
    assert not torch.equal(tokens[0], tokens[1])


def test_tokenizers_travel_between_processes(tokenizer):
    other = pickle.loads(pickle.dumps(tokenizer))
    assert other.encode("open the drawer") == tokenizer.encode("open the drawer")
    assert (other.bos, other.vocab_size) == (2, 340)


def test_bytes_need_no_file():
    tokenizer = ByteTokenizer()
    assert prompt_tokens(tokenizer, "Öl") == [2, 4 + 0xC3, 4 + 0x96, 4 + ord("l"), 4 + ord("\n")]
    assert max(tokenizer.encode("\N{LATIN SMALL LETTER Y WITH DIAERESIS}" + "".join(map(chr, range(256))))) < 260


def test_a_missing_file_is_named_in_one_line(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer at .*absent.model; it is PaliGemma's .*hf download") as caught:
        SentencePieceTokenizer(tmp_path / "absent.model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no model"])
def test_a_foreign_file_is_named(tmp_path, content):
    (tmp_path / "foreign.model").write_bytes(content)
    with pytest.raises(DataError, match=r"foreign.model (is no sentencepiece model|has no token that begins)"):
        SentencePieceTokenizer(tmp_path / "foreign.model")


def test_a_missing_package_is_named(model_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(MissingDependency, match=r"sentencepiece: bash requirements/install.sh .* --model openpi"):
        SentencePieceTokenizer(model_file)
