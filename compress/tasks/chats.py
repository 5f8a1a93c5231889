"""Read conversations, and find the assistant's words in what a chat template makes of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from compress.errors import UserError
from compress.tasks.labels import is_blank, replace_surrogates
from compress.tasks.sources import Columns, Messages, Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
ASSISTANT = "assistant"
SIMPLE = (
    "{{- bos_token or '' }}{% for message in messages %}"
    "{{ message['role'] + ': ' + (message['content'] | trim) + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
"""The template ``simple``: every turn is its role, a colon, the words and the end-of-sequence token."""
TAGS = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The tag by which a template itself says what the assistant writes."""


class ChatError(UserError):
    """A conversation that a chat template cannot render; whoever knows the row adds it."""


# From a data set to messages


def read_conversations(rows: Rows, columns: Columns, names: Messages) -> dict[str, list[Any]]:
    """Return the columns ``text``, ``messages`` and ``origin`` of a table with one conversation a row.

    A cell of the text's column is a list of messages, or its JSON. A cell of plain text is what the user says, and the
    label's column holds the assistant's answer. Turns after the assistant's last are left out: nobody answers them.
    ``text`` is the transcript and ``origin`` the file and the row.

    Raises:
        UserError: a row holds no conversation; the message names its file and row.
    """
    table: dict[str, list[Any]] = {"text": [], "messages": [], "origin": []}
    for row, (cell, answer) in enumerate(zip(*_find_cells(rows, columns))):
        origin = rows.locate_row(row)
        try:
            messages = _read_cell(cell, answer, columns, names)
        except ChatError as error:
            raise UserError(f"{origin}: {error}") from error
        table["text"].append(transcribe(messages))
        table["messages"].append(messages)
        table["origin"].append(origin)
    return table


def transcribe(messages: Iterable[Message]) -> str:
    """Return a conversation as plain text, a line for each turn: ``user: Hello``."""
    return "\n".join(f"{message['role']}: {message['content'].strip()}" for message in messages)


def _find_cells(rows: Rows, columns: Columns) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return the cells of the conversations and of the answers to plain questions; None where there are none."""
    name = columns.text if isinstance(columns.text, str) else columns.text[0]
    cells = rows.table.get(name)
    if cells is None and list(rows.table) == ["text"]:  # lines of JSON that were read as text
        cells = rows.table["text"]
    if cells is None:
        raise UserError(
            f"{rows.files[0][0]} has no column `{name}`; it has {', '.join(rows.table)}. Set task.columns.text to the "
            "column of the conversations."
        )
    return cells, rows.table.get(columns.label or "", [None] * len(cells))


def _read_cell(cell: Any, answer: Any, columns: Columns, names: Messages) -> list[Message]:
    found = _parse_json(cell, answer) if isinstance(cell, str) else cell
    messages = _pair_texts(cell, answer) if found is None else _read_messages(found, columns, names)
    if names.merge:
        messages = merge_neighbours(messages)
    if names.system and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": names.system})
    last = max((i for i, message in enumerate(messages) if message["role"] == ASSISTANT), default=-1)
    if last < 0:
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages)) or "no turn"
        raise ChatError(
            f"the conversation has no turn of the assistant, only {roles}. Remove the row, or set task.messages.roles "
            "to the roles of the data, such as {gpt: assistant}."
        )
    return messages[: last + 1]


def _parse_json(cell: str, answer: Any) -> Any:
    """Return the JSON in a text; None if it is none, but a question with an ``answer``."""
    if cell.lstrip().startswith(("[", "{")):
        try:
            return json.loads(cell)
        except ValueError as error:
            if is_blank(answer):
                raise ChatError(f"`{cell[:60]}` is no JSON ({error}). Correct the row.") from error
    return None


def _pair_texts(question: str, answer: Any) -> list[Message]:
    """Return the turns of a question and its answer."""
    if is_blank(answer):
        raise ChatError(
            f"`{question[:60]}` is a text without an answer; messages are expected. Set task.columns.label to the "
            "column of the answers, or task.columns.text to the column of the conversations."
        )
    turns = (("user", question), (ASSISTANT, str(answer)))
    return [{"role": role, "content": replace_surrogates(words)} for role, words in turns]


def _read_messages(cell: Any, columns: Columns, names: Messages) -> list[Message]:
    """Return the messages of a list, or of an object that has the list under the column's name."""
    if isinstance(cell, dict):
        cell = cell.get(str(columns.text), cell)
    if not isinstance(cell, list) or not all(isinstance(message, dict) for message in cell):
        raise ChatError(
            f"`{str(cell)[:60]}` is no list of messages. Set task.columns.text to the column of the conversations."
        )
    return [_read_message(message, number, names) for number, message in enumerate(cell, start=1)]


def _read_message(message: dict[str, Any], number: int, names: Messages) -> Message:
    """Return a message as its role and its words."""
    role, words = message.get(names.role), next((message[key] for key in names.contents if key in message), None)
    if role is None or words is None:
        raise ChatError(
            f"message {number} has the keys {', '.join(map(str, message))}; `{names.role}` and "
            f"`{names.contents[0]}` are expected. Set task.messages.role and task.messages.content."
        )
    if isinstance(words, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in words):
        words = "\n".join(str(part.get("text", "")) for part in words)
    if not isinstance(words, str):
        raise ChatError(f"message {number} holds `{str(words)[:60]}`, which is no text. Correct the row.")
    known = names.roles.get(str(role))
    if known is None:
        raise ChatError(
            f"the role `{str(role)[:40]}` of message {number} is none of {', '.join(names.roles)}. Set "
            f"task.messages.roles to the roles of the data, such as {{{str(role)[:40]}: user}}."
        )
    return {"role": known, "content": replace_surrogates(words)}


def merge_neighbours(messages: Iterable[Message]) -> list[Message]:
    """Return the messages with neighbouring turns of one role joined by a line break."""
    merged: list[Message] = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"]:
            merged[-1] = {**message, "content": f"{merged[-1]['content']}\n{message['content']}"}
        else:
            merged.append(dict(message))
    return merged


# From messages to tokens


class Encoded(NamedTuple):
    """A conversation's tokens, and the places ``(start, stop)`` of the assistant's turns among them."""

    ids: list[int]
    answers: list[tuple[int, int]]


def choose_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Set the chat template that a tokenizer uses: its own, ``simple``, or the text of a Jinja template.

    Raises:
        UserError: there is none, or the tokenizer cannot say which characters a token is of.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"`{type(tokenizer).__name__}` is written in Python and does not say where a token begins, so the "
            "assistant's words cannot be found. Set model.path to a folder with tokenizer.json."
        )
    if template is not None:
        if template == "simple" and not tokenizer.eos_token:
            raise UserError(
                "task.template is simple, which ends every turn with the end-of-sequence token, and the tokenizer has "
                "none. Set task.template to a Jinja template."
            )
        tokenizer.chat_template = SIMPLE if template == "simple" else template
    if not tokenizer.chat_template:
        raise UserError(
            "The model's tokenizer has no chat template, and a task of kind chat needs one. Set task.template=simple "
            "(a base model learns it), or model.path to an instruction-tuned model."
        )


def render(tokenizer: Any, messages: list[Message], prompt: bool = False) -> str:
    """Return the conversation as text by the tokenizer's template; with ``prompt``, up to the assistant's next words.

    Raises:
        ChatError: the template refuses the conversation.
    """
    from jinja2.exceptions import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except (TemplateError, TypeError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")
        raise ChatError(
            f"the chat template refuses the conversation ({reason}); its roles are "
            f"{', '.join(message['role'] for message in messages[:6])}{', ...' if len(messages) > 6 else ''}. Set "
            "task.messages.merge=true to join neighbouring turns of one role, or task.template=simple."
        ) from error


def encode_chat(tokenizer: Any, messages: list[Message]) -> Encoded:
    """Return the tokens of a conversation and the assistant's turns, each with the token that ends it.

    A template with ``{% generation %}`` says itself what the assistant writes.

    Raises:
        ChatError: the template refuses the conversation, leaves words out, or hides where an answer begins.
    """
    text = render(tokenizer, messages)
    for message in messages:
        if message["content"].strip() not in text:
            raise ChatError(
                f"the chat template leaves out or changes the words of a turn of role `{message['role']}` "
                f"(`{message['content'].strip()[:40]}`). Set task.messages.roles to roles that it knows, or "
                "task.template=simple."
            )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tagged = TAGS.search(tokenizer.get_chat_template())
    spans = read_tags(tokenizer, messages) if tagged else find_answers(tokenizer, messages, text)
    offsets = encoded["offset_mapping"]
    answers = []
    for start, stop in spans:
        inside = [
            place
            for place, (first, end) in enumerate(offsets)
            # A token may begin with the space that ends the prompt.
            if first < stop and end > start and not text[first:start].strip()
        ]
        if not inside:
            raise ChatError("an answer of the assistant has no token of its own. Set task.template=simple.")
        answers.append((inside[0], inside[-1] + 1))
    return Encoded(list(encoded["input_ids"]), answers)


def read_tags(tokenizer: Any, messages: list[Message]) -> list[tuple[int, int]]:
    """Return where the parts begin and end that the template marks as the assistant's, in characters.

    Raises:
        ChatError: it marks nothing.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        [messages],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    (spans,) = rendered[1]
    if not (marked := [(start, stop) for start, stop in spans if 0 <= start < stop]):
        raise ChatError(
            "the chat template has the tag `generation` and marks nothing as the assistant's. Set task.template=simple."
        )
    return marked


def find_answers(tokenizer: Any, messages: list[Message], text: str) -> list[tuple[int, int]]:
    """Return where the assistant's turns begin and end in the rendered ``text``, in characters.

    A turn begins where the template ends the prompt of the messages before it, and ends with the first special token
    after the words, or else with the turn.

    Raises:
        ChatError: the prompt before an answer is not how the whole conversation begins.
    """
    special = [re.escape(str(t.content)) for t in tokenizer.added_tokens_decoder.values() if t.special]
    mark = re.compile("|".join(sorted(special, key=len, reverse=True)) or r"(?!)")
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        words = message["content"].strip()
        through = share_beginning(render(tokenizer, messages[: i + 1]), text)
        prompt = render(tokenizer, messages[:i], prompt=True) if i else None
        if prompt is not None and text.startswith(prompt):
            start = len(prompt)
            at = text.find(words, start)
            if prompt == render(tokenizer, messages[:i]) and text[start:at].strip():
                start = at  # the template has no prompt for an answer, and its header is not the assistant's
        elif all(before["role"] == "system" for before in messages[:i]):
            start = at = through.rfind(words)  # nothing was asked; a template may have no such prompt
        else:
            start = at = -1
        end = at + len(words)
        if at < 0 or end > len(through):
            raise ChatError(
                f"the chat template renders the {i + 1} first turns otherwise when others follow, so the assistant's "
                "words cannot be found. Set task.template=simple, or a template with the tag `generation`."
            )
        ending = mark.search(through, end)
        spans.append((start, ending.end() if ending else len(through)))
    return spans


def share_beginning(first: str, second: str) -> str:
    """Return the beginning that two texts share."""
    if second.startswith(first):
        return first
    return first[: next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), len(second))]


def cut_chat(encoded: Encoded, max_length: int) -> tuple[list[int], list[int], bool]:
    """Return a conversation's tokens, at most ``max_length`` as :func:`shorten_chat` cuts them, its labels, and whether
    something before or in an answer was cut off. Labels are the tokens of the assistant's turns, and -100 elsewhere."""
    ids, answers = shorten_chat(encoded, max_length)
    labels = [-100] * len(ids)
    for start, stop in answers:
        labels[start:stop] = ids[start:stop]
    return ids, labels, len(answers) < len(encoded.answers) or answers[-1] != encoded.answers[-1]


def shorten_chat(encoded: Encoded, max_length: int) -> Encoded:
    """Return the first whole turns of a conversation, as many as have at most ``max_length`` tokens; if not even the
    first answer fits, the last tokens before its end."""
    ids, answers = encoded
    if len(ids) <= max_length:
        return encoded
    last = max((stop for _, stop in answers if stop <= max_length), default=answers[0][1])
    first = max(0, last - max_length)
    return Encoded(ids[first:last], [(max(0, start - first), stop - first) for start, stop in answers if stop <= last])
