import pytest

from pipeline.clean_up import lm1b

# what the published rules make of it, rule by rule; the last ones are their oddities
CASES = [
    ("see http : / / example.com / a", "see http://example.com/a"),
    ("see https : / / example.com", "see https://example.com"),
    ("it 's the dog 's", "it's the dog's"),
    ("He left . She stayed .", "He left. She stayed."),
    ("Why ? Because ! Now !", "Why? Because! Now!"),
    ("Really ?", "Really?"),
    ("one , two ; three : four / five", "one, two; three: four/five"),
    ('He said " yes " and went', 'He said "yes" and went'),
    ("a ' quoted ' word", "a 'quoted' word"),
    ("some ( few ) and [ fewer ] left", "some (few) and [fewer] left"),
    ("It cost $ 5 and £ 6", "It cost $5 and £6"),
    ("U.S . said", "U.S . said"),
    ("a , : b", "a,: b"),
    ("nothing to do", "nothing to do"),
    ("", ""),
]


@pytest.mark.parametrize(("tokenised", "text"), CASES)
def test_lm1b_is_put_together_as_published_models_do(tokenised: str, text: str) -> None:
    assert lm1b(tokenised) == text
