"""Prompts of mixed kinds for the default model, as chat turns."""

from __future__ import annotations

_LONG = (
    "The harbour lay quiet under a low sky. Boats knocked softly against the quay, and a dog slept beside a "
    "heap of nets. Marta counted the crates again: eleven of mackerel, four of crab, one of eels that nobody "
    "had ordered. The ledger said sixteen, the boat said fifteen, and the buyer from the city had said "
    "nothing at all since breakfast. She walked to the end of the pier, where the old crane stood, and "
    "looked for the missing crate in the water, among the weed and the floating corks. "
)

CHATS: dict[str, str] = {
    "code-python": "Write a Python function that merges two sorted lists into one sorted list.",
    "code-sql": "Write an SQL query that finds the three customers with the most orders in 2023.",
    "code-explain": "What does this do?\n\nfor (int i = 0; i < n; i++)\n    s ^= s << 13, s ^= s >> 7;",
    "code-fix": "Fix the bug:\n```python\ndef mean(xs):\n    return sum(xs) / len(x)\n```",
    "maths-word": "A shop sells pens at 3 for 2 euros. How much do 21 pens cost? Show your steps.",
    "maths-algebra": "Solve 3x + 7 = 2x - 5 and check the result.",
    "maths-count": "Count from 1 to 30, separated by commas.",
    "translate-fr": 'Translate into French: "The train to Lyon leaves at nine from platform four."',
    "translate-de": "Translate into German: My sister has bought a small red bicycle.",
    "chat-hello": "Hi! How are you today?",
    "chat-advice": "I slept badly before an exam. What should I do this morning?",
    "chat-opinion": "Is it better to learn the piano or the guitar first?",
    "list-animals": "List ten animals that live in the desert.",
    "list-steps": "Give me a numbered list of steps to change a bicycle tyre.",
    "json-person": 'Answer in JSON only: {"name": ..., "age": ..., "city": ...} for a made-up person.',
    "json-table": "Make a JSON array of four planets, each with its name and number of moons.",
    "unicode-emoji": "Explain what 🌍🚀✨ could mean, and answer with emoji where you can.",
    "unicode-japanese": "日本の首都はどこですか。短く答えてください。",
    "unicode-greek": "What do the letters Ω, λ and ψ stand for in physics?",
    "fact-history": "Who built the first steam engine, and when?",
    "fact-biology": "Why are leaves green?",
    "story": "Write a short story about a clock that runs backwards.",
    "poem": "Write a poem of eight lines about rain on a tin roof.",
    "repeat": "Repeat the word 'banana' twenty times.",
    "markdown": "Compare tea and coffee in a Markdown table with three rows.",
    "long-summary": f"Summarise this text in one sentence:\n\n{_LONG * 3}",
    "long-question": f"{_LONG}\n\nHow many crates of crab were there?",
    "one-word": "Yes",
}
