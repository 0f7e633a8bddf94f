"""Facts in ordinary words: what is hidden in a text, how it is asked for, and what the answer is.

A code of six digits is unlike anything around it; a policy that looks for unusual tokens keeps it.  These sentences
look like any others.  None is about anything that a novel or an encyclopedia says, and no answer can be guessed: with
the sentence left out of the text, the model gives the answer a far lower probability.

* ``place``, ``name``, ``reason``, ``object``, ``time``: one sentence says it.
* ``order``: what came before or after what.
* ``negation``: what is not so, or the one exception.
* ``several``: two sentences, hidden apart; the answer needs both.
* ``content``: nothing is hidden; the text itself says it.  Such questions are known for a few public texts, and are
  asked where a text has the passage.
"""

import re
from dataclasses import dataclass

_WORD = re.compile(r"\w+")
_PART = re.compile(r"\[.*?\]|[^\[\]\s][^\[\]]*(?<!\s)")


@dataclass(frozen=True)
class Fact:
    """What is asked for.

    Attributes:
        kind: See the module's docstring.
        sentences: What is hidden; for ``content`` the passage that says it, as the text has it.
        questions: Several wordings of one question.
        lead: How an answer to any of them may begin; with it, no probability is lost to choices of style.
        answer: How it goes on: the words whose probability counts, and in brackets others that are given between them.
    """

    kind: str
    sentences: tuple[str, ...]
    questions: tuple[str, ...]
    lead: str
    answer: str

    @property
    def is_hidden(self) -> bool:
        """Whether the sentences are put into the text, and do not stand there already."""
        return self.kind != CONTENT

    @property
    def parts(self) -> tuple[tuple[str, bool], ...]:
        """The answer's parts, and whether each counts."""
        return tuple((part.strip("[]"), part[0] != "[") for part in _PART.findall(self.answer))

    def is_found_in(self, said: str) -> bool:
        """Return whether these words contain all parts that count, whatever their case and punctuation."""
        words = _words(said)
        return all(_words(part) in words for part, counts in self.parts if counts)


def _words(text: str) -> str:
    return f" {' '.join(_WORD.findall(text.casefold()))} "


CONTENT = "content"

FACTS: tuple[Fact, ...] = (
    Fact(
        "place",
        ("The gardener had buried the letters under the pear tree.",),
        ("Where had the gardener buried the letters?", "Under what were the letters hidden by the gardener?"),
        "The letters were buried under the",
        "pear tree",
    ),
    Fact(
        "name",
        ("The lighthouse keeper had named his parrot Pickle.",),
        (
            "What had the lighthouse keeper named his parrot?",
            "What was the name of the bird that belonged to the lighthouse keeper?",
        ),
        "The parrot was called",
        "Pickle",
    ),
    Fact(
        "reason",
        ("The regatta was cancelled because of a plague of frogs.",),
        ("Why was the regatta cancelled?", "What was the reason that there was no regatta?"),
        "It was cancelled because of a plague of",
        "frogs",
    ),
    Fact(
        "object",
        ("For his birthday the bishop received a telescope.",),
        ("What did the bishop receive for his birthday?", "Which present was the bishop given?"),
        "The bishop received a",
        "telescope",
    ),
    Fact(
        "time",
        ("The ferry to the island sails only at full moon.",),
        ("When does the ferry to the island sail?", "What must one wait for to reach the island by ferry?"),
        "The ferry sails only at",
        "full moon",
    ),
    Fact(
        "order",
        ("Before she opened the shop, Marta fed the geese.",),
        ("What did Marta do before she opened the shop?", "With what did Marta begin, before the shop was opened?"),
        "First Marta fed the",
        "geese",
    ),
    Fact(
        "negation",
        ("Everyone in the village came to the feast except the blacksmith.",),
        ("Who did not come to the feast?", "Which villager was missing at the feast?"),
        "The one who did not come was the",
        "blacksmith",
    ),
    Fact(
        "several",
        ("Old Tobias keeps his gold in a teapot.", "Old Tobias keeps his silver in a boot."),
        (
            "Where does Old Tobias keep his gold and his silver?",
            "In which two things would you find the gold and the silver of Old Tobias?",
        ),
        "He keeps the gold in a",
        "teapot [and the silver in a] boot",
    ),
    Fact(
        "place",
        ("Captain Brandt keeps his spare compass inside the piano.",),
        (
            "Where does Captain Brandt keep his spare compass?",
            "In which piece of furniture would you find the captain's spare compass?",
        ),
        "He keeps it inside the",
        "piano",
    ),
    Fact(
        "name",
        ("The new schoolmistress is called Agatha Thorne.",),
        ("What is the new schoolmistress called?", "What is the name of the woman who now teaches at the school?"),
        "Her name is",
        "Agatha Thorne",
    ),
    Fact(
        "reason",
        ("Old Henrik sold his violin because he had gone deaf.",),
        ("Why did Old Henrik sell his violin?", "For what reason has Old Henrik no violin any more?"),
        "He sold it because he had gone",
        "deaf",
    ),
    Fact(
        "object",
        ("The fisherman pulled a rusty bicycle out of the harbour.",),
        (
            "What did the fisherman pull out of the harbour?",
            "Which thing lay in the harbour until the fisherman got it out?",
        ),
        "He pulled out a rusty",
        "bicycle",
    ),
    Fact(
        "time",
        ("The dentist visits the island every third Thursday.",),
        ("When does the dentist visit the island?", "On which days can the islanders see a dentist?"),
        "The dentist comes every third",
        "Thursday",
    ),
    Fact(
        "order",
        ("The widow locked the cellar, then wound the clock, and last of all burned the map.",),
        ("What did the widow do last of all?", "What did the widow do after she had wound the clock?"),
        "Last of all she burned the",
        "map",
    ),
    Fact(
        "negation",
        ("The young pilot never learned to whistle.",),
        ("What did the young pilot never learn?", "Which thing is the young pilot unable to do?"),
        "The pilot never learned to",
        "whistle",
    ),
    Fact(
        "several",
        (
            "The sculptor from Bergen brought a sleigh to the auction.",
            "The sister of the sculptor brought a cello to the auction.",
        ),
        (
            "Which two things did the sculptor and his sister bring to the auction?",
            "What did the sculptor and the sculptor's sister want to sell at the auction?",
        ),
        "The sculptor brought a",
        "sleigh [and his sister a] cello",
    ),
    Fact(
        "place",
        ("The twins hid the stolen lantern behind the beehives.",),
        ("Where did the twins hide the stolen lantern?", "Behind what is the lantern that the twins stole?"),
        "They hid it behind the",
        "beehives",
    ),
    Fact(
        "name",
        ("The church organ was repaired by Ivan Petrov.",),
        ("Who repaired the church organ?", "Which man made the organ in the church play again?"),
        "The organ was repaired by",
        "Ivan Petrov",
    ),
    Fact(
        "reason",
        ("The baker closed early because her oven had cracked.",),
        ("Why did the baker close early?", "What made the baker shut her shop before the usual hour?"),
        "She closed because her",
        "oven [had] cracked",
    ),
    Fact(
        "object",
        ("The burglars took nothing but a jar of buttons.",),
        ("What did the burglars take?", "What was missing after the burglars had been there?"),
        "They took a jar of",
        "buttons",
    ),
    Fact(
        "time",
        ("Grandmother waters her ferns at midnight.",),
        ("When does Grandmother water her ferns?", "At what hour are Grandmother's ferns given water?"),
        "She waters them at",
        "midnight",
    ),
    Fact(
        "order",
        ("The explorers crossed the swamp first, and only then the desert.",),
        (
            "What did the explorers cross before the desert?",
            "What had the explorers behind them when they came to the desert?",
        ),
        "Before the desert they crossed the",
        "swamp",
    ),
    Fact(
        "negation",
        ("The one fruit that the countess refuses to eat is the quince.",),
        ("Which fruit does the countess refuse to eat?", "What kind of fruit would the countess leave on her plate?"),
        "The fruit that she does not eat is the",
        "quince",
    ),
    Fact(
        "several",
        ("Young Anton wants to become a diver.", "Emil, the brother of Anton, wants to become a barber."),
        (
            "What do the brothers Anton and Emil want to become?",
            "Which two trades do Anton and his brother Emil dream of?",
        ),
        "Anton wants to become a",
        "diver [and Emil wants to become a] barber",
    ),
    Fact(
        "place",
        ("Aunt Rosalind spends every winter in Zanzibar.",),
        ("Where does Aunt Rosalind spend every winter?", "To which place does Aunt Rosalind go when it gets cold?"),
        "She spends it in",
        "Zanzibar",
    ),
    Fact(
        "name",
        ("The fastest rider of the valley is Fatima.",),
        ("Who is the fastest rider of the valley?", "Who in the valley rides faster than all the others?"),
        "The fastest rider is",
        "Fatima",
    ),
    Fact(
        "reason",
        ("The judge wears gloves because she is afraid of ink.",),
        ("Why does the judge wear gloves?", "For what reason are the hands of the judge covered?"),
        "She wears them because she is afraid of",
        "ink",
    ),
    Fact(
        "object",
        ("The professor uses a horseshoe as a paperweight.",),
        ("What does the professor use as a paperweight?", "What keeps the professor's papers from flying away?"),
        "The professor uses a",
        "horseshoe",
    ),
    Fact(
        "time",
        ("The aquarium is closed during the whole of November.",),
        ("During which month is the aquarium closed?", "When in the year can nobody visit the aquarium?"),
        "The aquarium is closed in",
        "November",
    ),
    Fact(
        "order",
        ("As soon as the bell had rung, the monks released the pigeons.",),
        ("What did the monks do as soon as the bell had rung?", "What followed the ringing of the bell?"),
        "The monks released the",
        "pigeons",
    ),
    Fact(
        "negation",
        ("The will was not written by the notary but by a sailor.",),
        ("Who wrote the will?", "If it was not the notary, who wrote the will?"),
        "The will was written by a",
        "sailor",
    ),
    Fact(
        "several",
        ("The inn at the pass is run by Leonora.", "The mill below the pass is run by Casimir."),
        (
            "Who run the inn at the pass and the mill below the pass?",
            "Whom would you meet first in the inn at the pass and then in the mill below it?",
        ),
        "The inn is run by",
        "Leonora [and the mill is run by] Casimir",
    ),
    Fact(
        "place",
        ("The shepherd sleeps in an abandoned railway carriage.",),
        ("Where does the shepherd sleep?", "What serves the shepherd as a bedroom?"),
        "The shepherd sleeps in an abandoned",
        "railway carriage",
    ),
    Fact(
        "name",
        ("The ship that carried the apples was the Silver Heron.",),
        ("Which ship carried the apples?", "What was the name of the vessel with the apples on board?"),
        "The ship was the",
        "Silver Heron",
    ),
    Fact(
        "reason",
        ("The night train stopped in the forest because a moose lay on the rails.",),
        ("Why did the night train stop in the forest?", "What kept the night train waiting among the trees?"),
        "The train stopped because of a",
        "moose",
    ),
    Fact(
        "object",
        ("The princess traded her crown for a sack of walnuts.",),
        ("For what did the princess trade her crown?", "What did the princess get when she gave her crown away?"),
        "She got a sack of",
        "walnuts",
    ),
    Fact(
        "time",
        ("The siege of the castle lasted for eleven weeks.",),
        ("How long did the siege of the castle last?", "For how much time did the enemy lie before the castle?"),
        "It lasted for",
        "eleven weeks",
    ),
    Fact(
        "order",
        ("The parade was led by the fire brigade, followed by the acrobats and then by the mayor.",),
        ("Who followed the fire brigade in the parade?", "Who walked between the fire brigade and the mayor?"),
        "The fire brigade was followed by the",
        "acrobats",
    ),
    Fact(
        "negation",
        ("No door of the inn was left open except the one to the pantry.",),
        ("Which door of the inn was left open?", "Where in the inn would you have found an open door?"),
        "The open door was the one to the",
        "pantry",
    ),
    Fact(
        "several",
        (
            "The soup of the monastery is made of nettles.",
            "The bread of the monastery is made of acorns.",
        ),
        (
            "What are the soup and the bread of the monastery made of?",
            "Of which two things does the monastery make its soup and its bread?",
        ),
        "The soup is made of",
        "nettles [and the bread is made of] acorns",
    ),
    Fact(
        "place",
        ("The wedding guests gathered on the frozen lake.",),
        ("Where did the wedding guests gather?", "At which place did the guests of the wedding meet?"),
        "They gathered on the",
        "frozen lake",
    ),
    Fact(
        "name",
        ("The duchess married a tailor by the name of Otto.",),
        ("What was the name of the tailor whom the duchess married?", "Who became the husband of the duchess?"),
        "She married a tailor by the name of",
        "Otto",
    ),
    Fact(
        "reason",
        ("Clara left the choir because of her fencing lessons.",),
        ("Why did Clara leave the choir?", "What made Clara give up singing with the others?"),
        "She left because of her",
        "fencing",
    ),
    Fact(
        "object",
        ("The blind carpenter carves nothing but wooden owls.",),
        ("What does the blind carpenter carve?", "Which animals does the blind carpenter make?"),
        "He carves wooden",
        "owls",
    ),
    Fact(
        "time",
        ("The clockmaker was born during an earthquake.",),
        ("When was the clockmaker born?", "What happened while the clockmaker was being born?"),
        "He was born during an",
        "earthquake",
    ),
    Fact(
        "order",
        ("Nadia learned to play the bagpipes before she learned to swim.",),
        ("What did Nadia learn before she learned to swim?", "Which skill had Nadia already when she learned to swim?"),
        "She had learned to play the",
        "bagpipes",
    ),
    Fact(
        "negation",
        ("The old tractor runs neither on petrol nor on diesel but on sunflower oil.",),
        ("What does the old tractor run on?", "With what must the old tractor be filled?"),
        "It runs neither on petrol nor on diesel but on",
        "sunflower oil",
    ),
    Fact(
        "several",
        ("The red balloon came down in a vineyard.", "The yellow balloon came down on a glacier."),
        ("Where did the red and the yellow balloon come down?", "In which two places did the two balloons land?"),
        "The red one came down in a",
        "vineyard [and the yellow one on a] glacier",
    ),
)
"""Facts to hide, the kinds in turn."""

PASSAGES: tuple[Fact, ...] = (
    # Mary Shelley, Frankenstein, chapters 9 and 10.
    Fact(
        CONTENT,
        ("At length I arrived at the village of Chamounix.",),
        ("At which village does the narrator arrive?", "What is the village called that the narrator comes to?"),
        "He arrives at the village of",
        "Chamounix",
    ),
    Fact(
        CONTENT,
        ("I stood beside the sources of the Arveiron,",),
        ("Beside the sources of which river did the narrator stand?", "Which river rises where the narrator stood?"),
        "He stood beside the sources of the",
        "Arveiron",
    ),
    Fact(
        CONTENT,
        ("It was nearly noon when I arrived at the top of the ascent.",),
        ("What time was it when the narrator reached the top?", "When did the narrator complete his ascent?"),
        "It was nearly",
        "noon",
    ),
    # Herman Melville, Moby Dick, chapters 7 and 8.
    Fact(
        CONTENT,
        ("Wrapping myself in my shaggy jacket of the cloth called bearskin,",),
        ("Of which cloth is the narrator's shaggy jacket?", "What is the cloth of the shaggy jacket called?"),
        "It is of the cloth called",
        "bearskin",
    ),
    Fact(
        CONTENT,
        ("As well might those tablets stand in the cave of Elephanta as here.",),
        ("In which cave might those tablets stand as well?", "Which cave would be as good a place for those tablets?"),
        "It is the cave of",
        "Elephanta",
    ),
    Fact(
        CONTENT,
        ("But Faith, like a jackal, feeds among the tombs,",),
        ("Like which animal does Faith feed among the tombs?", "With which animal is Faith compared?"),
        "Faith is like a",
        "jackal",
    ),
    Fact(
        CONTENT,
        ("When he entered I observed that he carried no umbrella,",),
        ("What did Father Mapple not carry when he entered?", "Without what had Father Mapple come?"),
        "He carried no",
        "umbrella",
    ),
    # Jane Austen, Pride and Prejudice, chapter 10.
    Fact(
        CONTENT,
        ("Tell your sister I am delighted to hear of her improvement on the harp;",),
        ("On which instrument has the sister improved?", "Which instrument does the sister play?"),
        "She has made an improvement on the",
        "harp",
    ),
    Fact(
        CONTENT,
        ("I think it infinitely superior to Miss Grantley's.",),
        ("To whose design is the sister's design superior?", "Whose design for a table is not as good?"),
        "It is superior to that of Miss",
        "Grantley",
    ),
    Fact(
        CONTENT,
        ("He leaves out half his words, and blots the rest.",),
        (
            "What does Charles do with the words that he does not leave out?",
            "When Charles writes a letter, what happens to half of his words?",
        ),
        "Half of his words he leaves out, and the rest he",
        "blots",
    ),
    Fact(
        CONTENT,
        ("He studies too much for words of four syllables.",),
        ("For which words does Darcy study too much?", "Of what length are the words that Darcy looks for?"),
        "He studies too much for words of",
        "four syllables",
    ),
    # Wikipedia, Christopher Gore, as in WikiText-2.
    Fact(
        CONTENT,
        ("Gore temporarily continued his studies in Bradford until Harvard could resume operations in Concord .",),
        ("Where did Gore temporarily continue his studies?", "In which town did Gore study before Concord?"),
        "He continued his studies in",
        "Bradford",
    ),
    Fact(
        CONTENT,
        ("In 1785 he married Rebecca Amory Payne ,",),
        ("Whom did Gore marry?", "Who became the wife of Christopher Gore?"),
        "His wife was Rebecca",
        "Amory Payne",
    ),
    Fact(
        CONTENT,
        ('Writing under the pseudonym " Manlius " ,',),
        ("Under which pseudonym did Gore write?", "What did Gore call himself in the newspapers?"),
        "His pseudonym was",
        "Manlius",
    ),
    # The help topics of Python, on imports.
    Fact(
        CONTENT,
        ("import foo.bar.baz as fbb # foo, foo.bar, and foo.bar.baz imported, foo.bar.baz bound as fbb",),
        ("Under which name is foo.bar.baz imported?", "As what is the module foo.bar.baz bound in the example?"),
        "It is imported as",
        "fbb",
    ),
)
"""Passages of public texts, with questions about them."""
