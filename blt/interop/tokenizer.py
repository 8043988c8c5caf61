"""The byte vocabulary as a tokenizer that transformers' AutoTokenizer loads: files of JSON, no code.

A byte-level BPE without a merge: each byte of the text is an id of its own, byte + 4, and the four special ids lie
below. Text never becomes a special id, whatever it spells, so any text comes back as it was. Encoding opens with BOS.
"""

from blt.config_json import Json
from blt.vocabulary import BOE, BOS, BPE_DELIMITER, BYTE_OFFSET, EOS

SPECIAL_TEXTS = {BOE: "<boe>", BOS: "<s>", EOS: "</s>", BPE_DELIMITER: "<bpe>"}


def tokenizer_json() -> dict[str, Json]:
    """tokenizer.json of the tokenizers library."""
    byte_level: Json = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    vocabulary: dict[str, Json] = {text: number for number, text in SPECIAL_TEXTS.items()}
    vocabulary |= {character: byte + BYTE_OFFSET for byte, character in enumerate(byte_characters())}
    opening: list[Json] = [{"SpecialToken": {"id": SPECIAL_TEXTS[BOS], "type_id": 0}}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number, text in SPECIAL_TEXTS.items()
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*opening, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [*opening, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {
                SPECIAL_TEXTS[BOS]: {"id": SPECIAL_TEXTS[BOS], "ids": [BOS], "tokens": [SPECIAL_TEXTS[BOS]]}
            },
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }


def tokenizer_config() -> dict[str, Json]:
    """tokenizer_config.json of transformers."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        # Special tokens are split like other text: "</s>" in a prompt is four bytes, not the end of the document.
        "split_special_tokens": True,
        "bos_token": SPECIAL_TEXTS[BOS],
        "eos_token": SPECIAL_TEXTS[EOS],
        "pad_token": SPECIAL_TEXTS[BOE],
    }


def byte_characters() -> str:
    """The character that stands for each byte in a byte-level vocabulary: itself where it is printable, else the next
    of those from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte) if byte in printable else chr(next(others)) for byte in range(256))
