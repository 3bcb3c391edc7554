"""How a model is asked: which template "auto" takes, what a prompt holds, and what ends an answer."""

import json

import pytest
from vocabularies import of_bytes

from nanor1.tasks.problems import Problem
from nanor1.tasks.prompts import NEXT_TURN, PromptOptions, choose_template, make_prompter
from nanor1.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}[im_start]{{ m.role }}\n{{ m.content }}[im_end]\n{% endfor %}"
    "{% if add_generation_prompt %}[im_start]assistant\n{% if loud %}!{% endif %}{% endif %}"
)
SUM = Problem("2 + 3?", "5", "gsm8k")


def make(template=CHATML, stops=None, eos="[end]"):
    """A tokenizer over bytes; `stops` are the tokens that generation_config.json ends on."""
    tokenizer = of_bytes(specials=["[im_start]", "[im_end]", "[other]"], eos=eos, chat_template=template)
    if stops is None:
        return tokenizer
    ids = [tokenizer.token_id(stop) for stop in stops]
    return Tokenizer(tokenizer._files | {"generation_config.json": json.dumps({"eos_token_id": ids}).encode()})


@pytest.mark.parametrize(
    ("tokenizer", "chosen"),
    [
        (make(stops=["[end]"]), "r1-zero"),  # as Qwen2.5-0.5B: it has learned no end of a turn
        (make(stops=["[end]", "[im_end]"]), "chat"),  # as its Instruct
        (make(eos="[im_end]"), "chat"),
        (make(template=None), "r1-zero"),
        (make(template="{% for m in messages %}[im_start]{{ m.content }}{% endfor %}"), "chat"),  # ends no turn at all
        (make(template=CHATML.replace("[im_end]", "[other]"), stops=["[im_end]"]), "r1-zero"),
    ],
)
def test_auto_takes_a_chat_template_that_the_model_has_learned(tokenizer, chosen):
    assert choose_template("auto", tokenizer, "r1-zero")[0] == chosen


def test_a_base_models_template_is_taken_where_it_is_asked_for_and_a_missing_one_refused():
    base = make(stops=["[end]"])
    template, why = choose_template("auto", base, "r1-zero")
    assert template == "r1-zero" and "base model" in why and "[im_end]" in why
    assert choose_template("chat", base, "r1-zero")[0] == "chat"
    assert choose_template("auto", base, "r1-zero", is_base_chat=True)[0] == "chat"
    assert choose_template("auto", make(template=None), "bare", is_base_chat=True)[0] == "bare"
    with pytest.raises(ValueError, match="no chat template"):
        choose_template("chat", make(template=None), "bare")


def test_a_base_model_that_is_asked_in_chats_has_the_end_of_a_turn_among_its_own_stops():
    base, chat = make(stops=["[end]"]), make(stops=["[end]", "[im_end]"])
    assert not base.ends_turns and make_prompter(PromptOptions(), base, "chat", "gsm8k").tokenizer.ends_turns
    for tokenizer, template in ((base, "r1-zero"), (chat, "chat"), (make(template=None), "bare")):
        assert make_prompter(PromptOptions(), tokenizer, template, "gsm8k").tokenizer is tokenizer


def test_a_prompt_has_system_message_examples_style_and_arguments(tmp_path):
    (tmp_path / "shots.jsonl").write_text('{"prompt": "1 + 1?", "completion": "Two: \\\\boxed{2}"}\n')
    options = PromptOptions(
        template_args='{"loud": true}', system="Be brief.", style="cot", few_shot=str(tmp_path / "shots.jsonl")
    )
    text, ids = make_prompter(options, make(), "chat", "gsm8k").write(SUM)
    turns = text.split("[im_start]")[1:]
    assert [turn.split("\n")[0] for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert turns[0] == "system\nBe brief.[im_end]\n" and turns[1].startswith("user\n1 + 1?")
    assert turns[2] == "assistant\nTwo: \\boxed{2}[im_end]\n" and "step by step" in turns[3]
    assert turns[4] == "assistant\n!" and ids == make().encode(text, allow_special=True)


@pytest.mark.parametrize(
    ("options", "template", "said"),
    [
        (dict(template_args='{"loud": 1}'), "r1-zero", "--template-args needs the template chat"),
        (dict(template_args='{"shy": 1}'), "chat", "no variable 'shy'; it has loud"),
        (dict(template_args="loud"), "chat", "--template-args"),
        (dict(template_args="[1]"), "chat", r"--template-args '\[1\]' are no JSON object"),
        (dict(template_args='{"messages": []}'), "chat", "no variable 'messages'; it has loud"),
        (dict(system="Hi"), "bare", "--system needs the template chat"),
        (dict(style="cot"), "r1-zero", "style 'cot'"),
    ],
)
def test_what_a_template_has_no_place_for_is_refused(options, template, said):
    with pytest.raises(ValueError, match=said):
        make_prompter(PromptOptions(**options), make(), template, "gsm8k")


@pytest.mark.parametrize(
    ("template", "asked", "texts"),
    [
        ("r1-zero", "auto", ("</answer>", NEXT_TURN)),
        ("chat", "auto", ()),
        ("bare", "auto", ()),
        ("r1-zero", None, ()),
        ("r1-zero", "", ()),
        ("r1-zero", "###", ("###",)),
        ("chat", "###", ("###",)),
    ],
)
def test_an_answer_ends_with_its_tag_or_a_new_turn_in_the_r1_zero_template_alone(template, asked, texts):
    prompter = make_prompter(PromptOptions(stop_text=asked), make(), template, "gsm8k")
    assert tuple(prompter.stops.get("stop_texts", ())) == texts
    assert prompter.stops["stop_ids"] == make().stop_ids and prompter.stops["vocab_size"] == make().vocab_size


def test_all_scripts_have_the_same_options_of_a_prompt():
    import distill
    import sample
    import train_sft
    import train_zero

    names = set(PromptOptions.__dataclass_fields__)
    for script in (train_zero, distill, sample):
        assert issubclass(script.Config, PromptOptions) and names <= set(script.Config.__dataclass_fields__)
    assert {"template_args", "system"} <= set(train_sft.Config.__dataclass_fields__)  # its files hold the rest
