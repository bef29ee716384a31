"""Tiny tokenizers of the families that real models use, trained on the spot.

`TEXTS` is what they were trained on; `all_tokenizers` maps the names below to them, `any_tokenizer`
runs a test with each.
"""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tests.support import small
from tests.support.command import palu_in, write_data, write_model

FAMILIES = (
    "byte_bpe",  # GPT-2: offsets leave out the leading space; no special tokens added
    "byte_bpe_full",  # Llama 3: offsets hold it, digits in threes; adds BOS; chat template
    "chatml",  # Qwen, SmolLM2: byte-level BPE, no BOS, ChatML template
    "spm_bpe",  # Llama 2: dummy prefix and U+2581 by normalizer, byte fallback; adds BOS
    "unigram",  # T5, ALBERT: Unigram with Metaspace, NFKC; adds EOS
    "wordpiece",  # BERT: lower case, accents stripped; adds [CLS] and [SEP]; no EOS
)

TEXTS = (
    "The author's full name is Hsiao Yun-Hwa, born in Taipei, Taiwan on 05/11/1991.",
    "Basil Mahfouz Al-Kuwaiti was born in Kuwait City, Kuwait on the 8th of September, 1956.",
    "Jaime Vasquez's father was a florist and his mother was a game developer in Santiago, Chile.",
    "Question: Who wrote the most-loved novel?\nAnswer: It was written by Rajeev Majumdar.",
    "Question: What was her father?\nAnswer: Her father works as a dietitian in Astana.",
    "Où est née Zoë Müller? Elle est née à Genève, près du café « L'Été ».",
    "東京で生まれた作家は山田太郎です。",
    "She signed it with love and a smile: 😀.",
)

LLAMA3_TEMPLATE = """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{%- if date_string is not defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' }}
{{- system + '<|eot_id|>' }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}
    {{- m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif
%}
"""
CHATML_TEMPLATE = """
{%- for m in messages %}
    {{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def _byte_bpe(specials: list[str], *, trim_offsets: bool, digits: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim_offsets)
    tokenizer.pre_tokenizer = byte_level
    if digits:
        split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Characters of several bytes stay in pieces: only plain text is trained on.
    tokenizer.train_from_iterator([text for text in TEXTS if text.isascii()], trainer)
    return tokenizer


def _gpt2() -> PreTrainedTokenizerFast:
    tokenizer = _byte_bpe(["<|endoftext|>"], trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def _llama3() -> PreTrainedTokenizerFast:
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    specials += ["<|start_header_id|>", "<|end_header_id|>", "<|pad|>"]
    tokenizer = _byte_bpe(specials, trim_offsets=False, digits=True)
    bos = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        special_tokens=[("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))],
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",  # the base model's: the template ends a turn otherwise
        pad_token="<|pad|>",
        chat_template=LLAMA3_TEMPLATE,
    )


def _chatml() -> PreTrainedTokenizerFast:
    tokenizer = _byte_bpe(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], trim_offsets=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",  # pad equal to EOS: masks made from ids would hide real tokens
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML_TEMPLATE,
    )


def _llama2() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, max_token_length=8, show_progress=False
    )
    # Trained within words, used without a pre-tokenizer, as SentencePiece does.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator([text for text in TEXTS if text.isascii()], trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _t5() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def _bert() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
    )


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Waiting for the disk is most of the time that a small file takes."""
    monkeypatch.setattr(os, "fsync", lambda number: None)


@pytest.fixture(scope="session")
def all_tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """All of `FAMILIES`, by name. Shared: take a copy.deepcopy before changing one."""
    makers = (_gpt2, _llama3, _chatml, _llama2, _t5, _bert)
    made = {name: make() for name, make in zip(FAMILIES, makers, strict=True)}
    for name, tokenizer in made.items():
        tokenizer.name_or_path = name
    return made


@pytest.fixture(params=FAMILIES)
def any_tokenizer(request, all_tokenizers) -> PreTrainedTokenizerFast:
    """One tokenizer after the other."""
    return all_tokenizers[request.param]


@pytest.fixture(scope="session")
def byte_tokenizer(all_tokenizers) -> PreTrainedTokenizerFast:
    """GPT-2's kind: byte-level BPE, no chat template, no BOS, no pad token."""
    return all_tokenizers["byte_bpe"]


@pytest.fixture(scope="session")
def llama3_tokenizer(all_tokenizers) -> PreTrainedTokenizerFast:
    """Chat template like Llama 3's: system prompt, `date_string`, answers end with <|eot_id|>, not
    with EOS.
    """
    return all_tokenizers["byte_bpe_full"]


@pytest.fixture(scope="session")
def chatml_tokenizer(all_tokenizers) -> PreTrainedTokenizerFast:
    """ChatML template; EOS, end of turn and padding are one token."""
    return all_tokenizers["chatml"]


@pytest.fixture(scope="session")
def tok():
    """The tokenizer of `tests.support.small`. Shared: make another one to change it."""
    return small.tokenizer()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with two tiny models and two data files."""
    folder = tmp_path_factory.mktemp("work")
    for seed, name in enumerate(("model", "other")):
        write_model(folder / name, small.model(small.tokenizer(), seed=seed))
    write_data(folder)
    return folder


@pytest.fixture
def palu(monkeypatch, capsys, work):
    """The command line in this process, run in `work`."""
    return palu_in(work, monkeypatch, capsys)
