"""Short texts of many kinds, written for this package, on which forgetting of language shows."""

VERSION = 1
"""Goes up with any change of the texts: losses on different ones cannot be compared."""

PROBE_TEXTS = (
    "Water boils at a lower temperature on a mountain than at the sea, because the air above it "
    "presses less. Cooks in high villages therefore boil potatoes longer, or use a closed pot in "
    "which the steam raises the pressure again.",
    "The capital of France is Paris, the capital of Japan is Tokyo, and the capital of Egypt is "
    "Cairo. Canberra, not Sydney, is the capital of Australia.",
    "A triangle with sides of three, four and five has a right angle, since nine plus sixteen is "
    "twenty-five. Its area is half of three times four, that is six.",
    "Question: A train leaves at a quarter past nine and arrives at ten to eleven. How long does "
    "it travel? Answer: From 9:15 to 10:15 is one hour, and 35 minutes more make 10:50. It travels "
    "for 1 hour and 35 minutes.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n",
    "The old lighthouse keeper climbed the stairs for the last time. Below him the harbour lay "
    "still, and a single boat came home late, its lamp swinging in the dark. He thought of the "
    "winter when the sea had taken the pier, and smiled.",
    "To plant a tree, dig a hole twice as wide as the roots but no deeper. Set the tree in the "
    "middle, fill the hole with the earth you took out, press it down and water it well. Do not "
    "bury the trunk.",
    "Photosynthesis takes place in the green parts of plants. With the energy of light, carbon "
    "dioxide and water become sugar, and oxygen is set free.",
    "Dear Ms Keller, thank you for your letter of the third of May. The missing parts were sent "
    "this morning and should reach you within two days. We are sorry for the delay. Yours "
    "sincerely",
    "If all sparrows are birds and all birds lay eggs, then all sparrows lay eggs. From the fact "
    "that a creature lays eggs, however, it does not follow that it is a sparrow.",
    "In 1969 two people walked on the Moon for the first time while a third waited in orbit. They "
    "brought back stones that are older than almost any found on Earth.",
    "SELECT name, price FROM products WHERE price < 20 ORDER BY price DESC LIMIT 5;",
    "The heart has four chambers. Blood without oxygen enters the right side and is pumped to the "
    "lungs; blood with oxygen returns to the left side and is pumped through the body.",
    "User: Can you give me three words that rhyme with light?\n"
    "Assistant: Of course. Night, bright and kite all rhyme with light.",
    "When the price of a good rises and nothing else changes, people usually buy less of it. How "
    "much less depends on what could take its place: salt has few substitutes, one brand of tea "
    "has many.",
    "Seven times eight is fifty-six. Twelve times twelve is one hundred and forty-four. Half of "
    "ninety is forty-five, and a third of it is thirty.",
    "The recipe needs two eggs, a cup of flour, half a cup of milk and a pinch of salt. Beat the "
    "eggs first, add the milk, then stir in the flour little by little so that no lumps form.",
    "Rivers carry sand and mud to the sea. Where the current slows down near the mouth, the load "
    "sinks, and over thousands of years new land grows there, which is called a delta.",
    '{"name": "Ada", "born": 1815, "known_for": ["mathematics", "notes on the first computer"]}',
    "She would have come earlier if the bridge had not been closed. As it was, she had to drive "
    "around the lake, and by the time she arrived the guests were putting on their coats.",
)
