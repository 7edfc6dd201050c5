"""The words of a catalog that have codes."""

# Position = the code that is stored. "" is a tag whose category nobody told.
CATEGORIES = (
    "",
    "artist",
    "character",
    "copyright",
    "general",
    "meta",
    "species",
    "lore",
    "quality",
    "special",
    "year",
    "rating",
)
CATEGORY_CODES = {name: code for code, name in enumerate(CATEGORIES)}

RATINGS = ("", "g", "s", "q", "e")  # position = the code that is stored; "" is unknown
RATING_CODES = {
    **{name: code for code, name in enumerate(RATINGS)},
    "general": 1,
    "safe": 1,
    "sensitive": 2,
    "questionable": 3,
    "explicit": 4,
}
