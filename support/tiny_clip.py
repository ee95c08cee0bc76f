from support import ASSETS
from support.tiny_world import *
from support.tiny_world import WordTokenizer, unknown_words
from support.tiny_words import TinyTokenizer, tokenizer_of
FOLDER = ASSETS / "tiny_clip"
