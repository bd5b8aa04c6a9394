"""Random conversations over /v1, for the fake and for the real CLI.

Clients let their conversations grow, edit and repeat turns, branch, and change tokens and system
prompts. Each time exactly the turns that the client sent must reach the model.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Dict, List, Sequence, Tuple

# (role, content): the content is a text or a list of blocks.
Message = Tuple[str, Any]

SYSTEM_PROMPTS = ("", "Be brief.", "Be kind.")
# {} is a number, so that no two prompts are the same.
PROMPTS = (
    "prompt {}", "prompt {}", "prompt {}", "prompt {}\nwith a second line", " blanks {} ",
    "/compact {}", "/clear {}", "sign é\u2028\U0001f600 {}", "<b>{}</b> \"quoted\" \\n",
)
DOCUMENT = {
    "type": "document",
    "source": {"type": "text", "media_type": "text/plain", "data": "A document."},
}
LONGEST_CHAT = 16


@dataclass
class RandomChat:
    """A conversation as its client knows it. client: its number; api: the wire format."""

    client: int
    api: str
    system: str
    messages: List[Message] = field(default_factory=list)


def text_of(content: Any) -> str:
    """Return the texts of a content."""
    if isinstance(content, str):
        return content
    return "".join(block["text"] for block in content if block["type"] == "text")


def comparable(message: Message) -> Message:
    """Return a turn as it is compared: blanks around an answer do not matter.

    The bridge sends a blank before a slash, and a placeholder for a blank answer.
    """
    role, said = message[0], text_of(message[1])
    if role == "assistant":
        return role, said.strip() or "(no answer)"
    return role, re.sub(" +/", "/", said)


class RandomChats:
    """Clients that do something random at each `step`.

    send: sends a conversation that ends with a prompt; returns the answer.
    received: returns the turns that reached the model last.
    disturb: what may happen between two requests, with its probability.
    """

    def __init__(
        self,
        seed: int,
        clients: int,
        send: Callable[[RandomChat], str],
        received: Callable[[], Sequence[Message]],
        disturb: Dict[Callable[[], None], float],
    ) -> None:
        self.chance = random.Random(seed)
        self.clients = clients
        self.send, self.received, self.disturb = send, received, disturb
        self.chats: List[RandomChat] = []
        self.count = 0
        self.history: List[str] = []
        # How often each operation is chosen.
        self.operations: Dict[Callable[[RandomChat], RandomChat], int] = {
            self.grow: 30, self.retry: 8, self.edit_prompt: 8, self.edit_answer: 5,
            self.branch: 6, self.change_token: 4, self.change_system: 4, self.trim: 3,
        }

    def step(self) -> None:
        """Do something with one conversation; check what reached the model."""
        self.count += 1
        for action, probability in self.disturb.items():
            if self.chance.random() < probability:
                self.note(action.__name__)
                action()
        if not self.chats or self.chance.random() < 0.1:
            chat = self.begin()
        else:
            # Rather one of the last ones: only few processes wait.
            number = min(int(self.chance.expovariate(0.5)), len(self.chats) - 1)
            chat = self.chats.pop(-1 - number)
            if len(chat.messages) > LONGEST_CHAT:
                chat = self.begin()
            else:
                operations = list(self.operations)
                weights = list(self.operations.values())
                (operation,) = self.chance.choices(operations, weights)
                chat = operation(chat)
                self.note(operation.__name__)
        self.note("client %d, %d messages" % (chat.client, len(chat.messages)))
        answer = self.send(chat)
        expected = list(map(comparable, chat.messages))
        received = list(map(comparable, self.received()))
        same = [ours == theirs for ours, theirs in zip(expected, received)]
        number = same.index(False) if False in same else len(same)
        assert received == expected, "operation %d: %s; turn %d: sent %s, received %s" % (
            self.count, self.history[-12:], number, expected[number:][:2], received[number:][:2]
        )
        chat.messages.append(("assistant", self.copy_of(answer)))
        self.chats.append(chat)
        del self.chats[:-8]

    def note(self, words: str) -> None:
        self.history.append(words)

    def begin(self) -> RandomChat:
        """Begin a conversation, or send one that began elsewhere."""
        self.note("begin")
        api = self.chance.choice(("anthropic", "openai"))
        chat = RandomChat(
            self.chance.randrange(self.clients), api, self.chance.choice(SYSTEM_PROMPTS)
        )
        for _ in range(self.chance.choice((0, 0, 1, 2, 5))):
            chat.messages += [("user", self.prompt(chat)), ("assistant", "elsewhere")]
        return self.grow(chat)

    def prompt(self, chat: RandomChat) -> Any:
        """Return a text, or rarely blocks, which cannot be piped."""
        words = self.chance.choice(PROMPTS).format(self.chance.randrange(10**9))
        kind = self.chance.random()
        if kind < 0.1:
            return [{"type": "text", "text": "part "}, {"type": "text", "text": words}]
        if kind < 0.15 and chat.api == "anthropic":
            return [DOCUMENT, {"type": "text", "text": words}]
        return words

    def copy_of(self, answer: str) -> Any:
        """Return an answer as a client keeps it."""
        if self.chance.random() < 0.1 and answer.strip():
            return [{"type": "text", "text": answer}]
        return self.chance.choice((answer, answer, answer.strip(), "\n" + answer + " "))

    # --- operations: each returns a conversation that ends with a prompt ---

    def grow(self, chat: RandomChat) -> RandomChat:
        chat.messages.append(("user", self.prompt(chat)))
        return chat

    def retry(self, chat: RandomChat) -> RandomChat:
        """Send the last prompt again."""
        del chat.messages[-1]
        return chat

    def edit_prompt(self, chat: RandomChat) -> RandomChat:
        """Edit a prompt, and send the conversation from there."""
        number = self.chance.randrange(len(chat.messages) // 2)
        del chat.messages[2 * number :]
        return self.grow(chat)

    def edit_answer(self, chat: RandomChat) -> RandomChat:
        """Edit an answer, or a prompt in the middle, and go on at the end."""
        number = self.chance.randrange(len(chat.messages))
        role = chat.messages[number][0]
        chat.messages[number] = (role, "edited %d" % self.chance.randrange(10**9))
        return self.grow(chat)

    def branch(self, chat: RandomChat) -> RandomChat:
        """Go on with a copy; the original may go on later."""
        self.chats.append(chat)
        return self.grow(replace(chat, messages=list(chat.messages)))

    def change_token(self, chat: RandomChat) -> RandomChat:
        """Go on with a copy under another token."""
        self.chats.append(chat)
        client = (chat.client + 1) % self.clients
        return self.grow(replace(chat, client=client, messages=list(chat.messages)))

    def change_system(self, chat: RandomChat) -> RandomChat:
        chat.system = self.chance.choice(SYSTEM_PROMPTS)
        return self.grow(chat)

    def trim(self, chat: RandomChat) -> RandomChat:
        """Leave the oldest turns out, as clients do whose context is full."""
        if len(chat.messages) > 2:
            del chat.messages[:2]
        return self.grow(chat)


def body_of(chat: RandomChat) -> Dict[str, Any]:
    """Return the body of the request."""
    messages = [{"role": role, "content": content} for role, content in chat.messages]
    body: Dict[str, Any] = {"max_tokens": 64, "messages": messages}
    if chat.system and chat.api == "anthropic":
        body["system"] = chat.system
    elif chat.system:
        messages.insert(0, {"role": "system", "content": chat.system})
    return body


__all__ = ["Message", "RandomChat", "RandomChats", "body_of"]
