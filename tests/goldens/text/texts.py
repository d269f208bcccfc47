"""What the vocabularies are trained on, and the texts that are encoded with them."""

CORPUS = """\
The quick brown fox jumps over the lazy dog, and the dog does not mind it at all.
A stoker keeps the furnace hot; a worker keeps the model warm. It isn't the same thing, but it's close.
def fibonacci(n):
    if n < 2:
        return n
    return fibonacci(n - 1) + fibonacci(n - 2)
In 1969 there were 4 computers; in 2024 there are 15,000,000,000 of them (more or less).
Größe, naïve, café, señor, Ångström: words with marks above their letters.
Съешь же ещё этих мягких французских булок, да выпей чаю.
我能吞下玻璃而不伤身体。私はガラスを食べられます。
We'll see what they've done, I'm sure he'd say you're right. WE'LL SEE.
the model the models the modelling of the model of the furnace of the worker of the works
"""

TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    "a",
    "The model is warm.",
    " The model",
    "the  furnace   of    the     worker",
    "It isn't, we'll see: they've, I'm, he'd, you're, WE'LL",
    "In 1969, 15,000,000,000 or 789 or 42 or 007 or 12345",
    "def f(n):\n    return n - 1\n\n\n\treturn\r\n",
    "trailing space ",
    "trailing newline\n",
    "Größe naïve café",
    "e\u0301 decomposed, \u00e9 composed",
    "Съешь же ещё",
    "我能吞下玻璃而不伤身体。",
    "🧵 👩\u200d🚀 🇩🇪",
    "\u2581 the sign itself \u2581\u2581",
    "<tool>call</tool> a <tool> b",
    "x" * 40,
    "!!!???...---===",
    "mixedCASE HTMLParser iPhone McDonald's",
    "\u00a0no\u00a0break\u3000wide",
    "١٢٣ ൧൨ Ⅳ ½ ²",
    "tab\tand\x00null\x1f",
]
