"""The tokenizer: text and chat messages -> token ids, with one contract for BOS and EOS.

BOS stands exactly once at the start of a prompt where the tokenizer itself adds one or
data.bos_token is set, and never in a completion. EOS stands exactly once at the end of a
completion. Neither is doubled where the text or the chat template has written it already. No id is
ever taken for padding: what is padding is known from lengths, so pad may equal EOS.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from typing import Any

from tokenizers import processors

from dpo_jax import config, paths
from dpo_jax.data import hub

# transformers says at import that PyTorch is missing, which nothing here needs
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


class Tokenizer:
    """A fast tokenizer of transformers, its special tokens and its chat template."""

    def __init__(
        self,
        fast: Any,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        chat_template: str | None = None,
    ):
        """Wraps a PreTrainedTokenizerFast; tokens and template left None are its own."""
        self.fast = fast
        self.backend = fast.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.vocabulary_size: int = max(vocabulary.values()) + 1
        self.bos_id: int | None = self.find(bos_token, "bos_token") if bos_token else own_bos(fast)
        self.eos_id: int = self.find(eos_token or fast.eos_token, "eos_token")
        self.eos_token: str = eos_token or fast.eos_token
        self.pad_id: int = fast.pad_token_id or 0
        self.chat_template: str | None = chat_template or fast.chat_template
        self.fingerprint: str = self.hash()

    def find(self, token: str | None, field: str) -> int:
        """The id of a special token; ValueError that names the config field where there is none."""
        found = None if token is None else self.backend.token_to_id(token)
        if found is not None:
            return found
        added = self.backend.get_added_tokens_decoder().values()
        likely = [str(one.content) for one in added if one.special]
        state = (
            "the tokenizer does not say which of its tokens this is"
            if token is None
            else f"{token!r} is not in the tokenizer's vocabulary"
        )
        option = field.replace("_", "-")
        raise ValueError(
            f"data.{field}: {state}; give --data.{option} one of its special tokens, such as: "
            f"{', '.join(map(repr, likely[:20])) or '(it has none)'}"
        )

    def hash(self) -> str:
        """A hash of everything that decides which ids a text or a conversation gets."""
        special = [self.bos_id, self.eos_id, self.pad_id, self.chat_template]
        # a template may name the tokenizer's own special tokens
        names = {name: str(token) for name, token in self.fast.special_tokens_map.items()}
        content = json.dumps([self.backend.to_str(), special, names], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, no special token added; those that it spells out are kept."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts, as encode gives them."""
        return [one.ids for one in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def decode_plain(self, ids: Sequence[int]) -> str:
        """The text of token ids without BOS and EOS, as a reader or a reward sees it.

        Other special tokens stay: in some vocabularies (GPT-NeoX's among them) they are words.
        """
        return self.decode([i for i in ids if i not in (self.bos_id, self.eos_id)])

    def token_text(self, id: int) -> str:
        """One token for display: its text, or its name where it is but a part of a character."""
        text = self.decode([id])
        return text if text and "\ufffd" not in text else str(self.backend.id_to_token(int(id)))

    def save(self, folder: str) -> None:
        """Writes a folder from which load_tokenizer, given no choices, gives this tokenizer."""
        backend = type(self.backend).from_str(self.backend.to_str())
        if self.bos_id is not None and own_bos(self.fast) != self.bos_id:
            bos = str(backend.id_to_token(self.bos_id))
            backend.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, self.bos_id)]
            )
        names = {name: str(token) for name, token in self.fast.special_tokens_map.items()}
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **names,
            "eos_token": self.eos_token,
            "clean_up_tokenization_spaces": False,
            # transformers 4 would give token_type_ids too, which its generate refuses
            "model_input_names": ["input_ids", "attention_mask"],
        }
        paths.write_text(paths.join(folder, "tokenizer.json"), backend.to_str(pretty=True))
        paths.write_text(
            paths.join(folder, "tokenizer_config.json"), json.dumps(settings, indent=2)
        )
        if self.chat_template is not None:
            paths.write_text(paths.join(folder, "chat_template.jinja"), self.chat_template)

    def begin(self, ids: list[int]) -> list[int]:
        """A prompt's ids with BOS once at the start, where there is a BOS."""
        if self.bos_id is None:
            return ids
        return [self.bos_id, *without_leading(ids, self.bos_id)]

    def finish(self, ids: list[int]) -> list[int]:
        """A completion's ids without BOS at the start and with EOS once at the end."""
        if self.bos_id is not None:
            ids = without_leading(ids, self.bos_id)
        stop = len(ids)
        while stop and ids[stop - 1] == self.eos_id:
            stop -= 1
        return [*ids[:stop], self.eos_id]

    def encode_prompt(self, prompt: str | list[dict]) -> list[int]:
        """Token ids of a prompt, text or messages, with BOS once where there is a BOS."""
        text = prompt if isinstance(prompt, str) else self.apply_chat_template(prompt)
        return self.begin(self.encode(text))

    def trim(self, completion: str) -> str:
        """A completion without the blanks that follow its EOS, which many chat templates write."""
        text = completion.rstrip()
        return text if text.endswith(self.eos_token) else completion

    def apply_chat_template(
        self, messages: list[dict], *, add_generation_prompt: bool = True
    ) -> str:
        """The text of messages, by default up to where the assistant's next answer begins."""
        if self.chat_template is None:
            raise ValueError(
                "the rows are chat messages and the tokenizer has no chat template; give the "
                "path of a Jinja file as --data.chat-template"
            )
        import jinja2

        try:
            return self.fast.apply_chat_template(
                messages,
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error


def load_tokenizer(data: config.Data, fallback: str | None) -> Tokenizer:
    """The tokenizer of data.tokenizer, or else of the fallback, which is the model's folder.

    Either is a folder with a tokenizer.json, such a file, or a name on the Hugging Face hub.
    ValueError where there is none, where it has no fast form, or where its EOS is unknown and
    data.eos_token does not say it.
    """
    source = data.tokenizer or fallback
    if source is None:
        raise ValueError(
            "no tokenizer: the model has no folder that one could lie in; give --data.tokenizer "
            "a folder, a tokenizer.json file or a hub name"
        )
    template = None
    if data.chat_template is not None:
        if not paths.exists(data.chat_template):
            raise ValueError(f"data.chat_template: no such file: {data.chat_template}")
        template = paths.read_text(data.chat_template)
    return Tokenizer(
        load_fast(source),
        bos_token=data.bos_token,
        eos_token=data.eos_token,
        chat_template=template,
    )


def load_fast(source: str) -> Any:
    """The transformers tokenizer of a folder, a tokenizer.json file or a hub name."""
    import transformers

    if source.endswith(".json"):
        if not paths.exists(source):
            raise ValueError(f"data.tokenizer: no such file: {source}")
        content = paths.read_text(source)
        with tempfile.TemporaryDirectory() as folder:
            local = os.path.join(folder, "tokenizer.json")
            paths.write_text(local, content)
            return transformers.PreTrainedTokenizerFast(tokenizer_file=local)
    if not paths.exists(source):
        return load_from_hub(source)
    if not paths.is_local(source):
        with tempfile.TemporaryDirectory() as folder:
            for name in FILES:
                if paths.exists(paths.join(source, name)):
                    content = paths.read_bytes(paths.join(source, name))
                    paths.write_bytes(os.path.join(folder, name), content)
            return load_folder(folder, source)
    return load_folder(source, source)


def load_folder(folder: str, name: str) -> Any:
    """The transformers tokenizer of a local folder, called name in errors."""
    import transformers

    file = os.path.join(folder, "tokenizer.json")
    if not os.path.exists(file):
        raise ValueError(
            f"data.tokenizer: {name} has no tokenizer.json; save the tokenizer in its fast form "
            "there, or name another folder, a tokenizer.json file or a hub name"
        )
    if not os.path.exists(os.path.join(folder, "tokenizer_config.json")):
        return transformers.PreTrainedTokenizerFast(tokenizer_file=file)
    return fast_only(
        transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True), name
    )


def load_from_hub(name: str) -> Any:
    """The tokenizer of a hub name, from the local cache where the hub cannot be asked."""
    import transformers

    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"data.tokenizer: no such folder: {name}")
    reason = hub.why_unreachable()
    try:
        found = transformers.AutoTokenizer.from_pretrained(
            name, local_files_only=reason is not None
        )
    except (OSError, ValueError) as error:
        if reason is None:
            raise ValueError(f"data.tokenizer {name!r}: {error}") from error
        raise ValueError(
            f"data.tokenizer: {name!r} is no folder here, it is not in the local cache, and the "
            f"hub cannot be asked: {reason}. Give --data.tokenizer a folder or a tokenizer.json "
            "file"
        ) from error
    return fast_only(found, name)


def fast_only(tokenizer: Any, name: str) -> Any:
    """The tokenizer; ValueError where it is not of the fast kind."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"data.tokenizer: {name} has no fast form ({type(tokenizer).__name__}); give one "
            "with a tokenizer.json"
        )
    return tokenizer


def own_bos(fast: Any) -> int | None:
    """The id that a tokenizer itself puts before a text; None where it puts none."""
    plain = fast("a", add_special_tokens=False)["input_ids"]
    full = fast("a", add_special_tokens=True)["input_ids"]
    return None if full[: len(plain)] == plain else full[0]


def without_leading(ids: list[int], id: int) -> list[int]:
    """The ids without those at the start that equal id."""
    start = 0
    while start < len(ids) and ids[start] == id:
        start += 1
    return ids[start:]
