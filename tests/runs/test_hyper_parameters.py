"""What loggers are told of a run."""

from visionpeft.runs.hyper_parameters import hyper_parameters


def test_names_are_those_of_the_command_line():
    content = {
        "seed_everything": 3,
        "output": "/home/somebody/runs",
        "trainer": {"max_epochs": 2, "precision": None, "logger": {"class_path": "CometLogger", "init_args": {"a": 1}}},
        "model": {
            "class_path": "visionpeft.tasks.ImageClassification",
            "init_args": {
                "method": [
                    {"class_path": "VPT", "init_args": {"num_tokens": 5, "overrides": {}}},
                    {"class_path": "BitFit"},
                ],
                "train": ["norm"],
                "head": None,
                "optimisation": {"lr": 0.1},
            },
        },
    }
    assert hyper_parameters(content) == {
        "seed_everything": 3,
        "trainer.max_epochs": 2,
        "model": "ImageClassification",
        "model.method.0": "VPT",
        "model.method.0.num_tokens": 5,
        "model.method.1": "BitFit",
        "model.train": ["norm"],
        "model.head": None,
        "model.optimisation.lr": 0.1,
    }


def test_secrets_are_not_told():
    data = {
        "root": "https://somebody:hidden@host.org/shards/{000..009}.tar?sig=hidden",
        "train": ["s3://bucket/a-??.tar", "https://host.org/b.tar#hidden"],
        "token": "hidden",
        "folder": "pictures@home/a?.png",
    }
    told = hyper_parameters(
        {"data": {"class_path": "StreamedImages", "init_args": data}, "model": {"token": 3, "num_tokens": 4}}
    )
    assert told == {
        "data": "StreamedImages",
        "data.root": "https://host.org/shards/{000..009}.tar",
        "data.train": ["s3://bucket/a-??.tar", "https://host.org/b.tar"],
        "data.folder": "pictures@home/a?.png",
        "model.token": 3,
        "model.num_tokens": 4,
    }
