"""The texts that the golden files are about."""

from __future__ import annotations

#: About 340 tokens, so that MiniLM (256) truncates it.
LONG = (
    "A blast furnace is never allowed to go out. Once the first fire has been lit it burns for years, because a "
    "furnace that cools does not simply wait to be lit again: the slag freezes to the walls, the brick lining cracks "
    "as it shrinks, and the iron at the bottom sets into a single block that the workers call a salamander. To restart "
    "it they must drill, blast and rebuild, and that takes months. So the crews work in shifts through every night and "
    "every holiday, and each shift hands the next one a fire that is already hot. The stoker's skill lies in small "
    "corrections. He listens to the draught, watches the colour of the flame through a blue glass, and feels in the "
    "handle of the shovel how the coal has packed. Too much fuel at once chokes the fire; too little, and the "
    "temperature falls faster than any shovel can follow. The best of them feed the furnace a little and often, never "
    "opening the door for longer than a breath, and keep a ledger of what was burnt and when, so that a stranger could "
    "take over in the middle of the night and know at a glance what the fire needs. When a new alloy is wanted they do "
    "not build a second furnace beside the first. They change what is added near the end: a little manganese, a little "
    "chromium, a ladle of something from the next bay. The base stays molten the whole time, and a hundred different "
    "steels can leave the same fire on the same day, each one with its own recipe, none of them waiting for a cold "
    "hearth to warm again."
)

SENTENCES = [
    "warm",
    "Hello, world!",
    "a warm model",
    "a cold start",
    "The cat sat on the mat.",
    "A kitten was resting on the rug.",
    "Interest rates rose by a quarter of a point on Thursday.",
    "The central bank raised borrowing costs by 0.25%.",
    "Bread needs only flour, water, salt and time.",
    "How do I reset my password?",
    "I can't log in because I have forgotten my passphrase.",
    "def fibonacci(n): return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
    "SELECT name, count(*) FROM visits WHERE day >= '2024-01-01' GROUP BY name ORDER BY 2 DESC;",
    "Der Ofen ist noch heiß, also müssen wir nicht von vorn anfangen.",
    "Il a neigé toute la nuit à Besançon, et le château était invisible à l'aube.",
    "東京の夏はとても暑いです。",
    "Привет, как дела?",
    "π ≈ 3.14159, and e^{iπ} + 1 = 0",
    "I love this 😍🔥 — best purchase of the year!!!",
    "  leading and trailing   spaces\tand a tab\n",
    (
        "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen; respiration runs the other way, "
        "and between the two of them most living things on the planet make their living."
    ),
    (
        "In 1829 Robert and George Stephenson entered Rocket in the trials at Rainhill. It was the only locomotive to "
        "finish, it reached thirty miles an hour, and it carried passengers on the day that the line between Liverpool "
        "and Manchester was opened in the following year."
    ),
    (
        "A queue is a promise: whoever puts work into it may go away, and whoever takes work out of it must either "
        "finish it or put it back. Everything difficult about queues comes from the moments in which that promise is "
        "about to be broken: a worker that dies with a message in its hand, a broker that restarts, a client that "
        "stopped listening, and a message that kills every worker that touches it. Count the attempts, keep the dead "
        "letters, and renew the lease."
    ),
    LONG,
]


def chat(user: str, system: str = "You are a helpful AI assistant named SmolLM, trained by Hugging Face") -> str:
    """SmolLM2's chat template, written out."""
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


#: Chosen so that no greedy step of theirs is a near tie: their text must be the same on every back-end.
PROMPTS = {
    "story": "Once upon a time",
    "code": "def fibonacci(n):\n",
    "fact": "The capital of France is",
    "list": "1, 2, 3, 4, 5, 6,",
    "accents": "naïve café, déjà vu, jalapeño, Zürich,",
    "chat-short": chat("What is the boiling point of water?"),
    "chat-explain": chat("Why is the sky blue?"),
    "long": LONG + "\n\nIn short, a furnace",
    "letter": "Dear Sir or Madam,\n\nI am writing to",
}

#: These are probed at three positions more than the last.
PROBED_PROMPTS = ("code", "long")
