"""Video runs from the command line: fit, evaluate, predict, resume, and what is refused."""

import json

import pytest
from small_runs import draw_images, failing_in_second_epoch, history_of, results, run
from small_video_runs import draw_videos, run_videos, video_arguments
from video_files import write_frames

import visionpeft as vp
from visionpeft import evaluate, fit, predict
from visionpeft.data import VideoFolder

AIM = ["--model.method", "{class_path: AIM, init_args: {num_frames: 3, drop_path: 0.3}}", "--model.dropout", "0.3"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return draw_videos(tmp_path_factory.mktemp("data") / "films")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("images") / "squares", per_class=6)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, videos):
    return run_videos(tmp_path_factory.mktemp("runs"), videos, "--seed_everything", "1", epochs=6, figures=True)


@pytest.fixture(scope="module")
def image_run(tmp_path_factory, images):
    return run(tmp_path_factory.mktemp("image_runs"), images, epochs=1)


def predicted(run_directory, output, *more):
    assert predict.main([str(run_directory), *map(str, more), "--output", str(output)]) == 0
    return json.loads(output.read_text())


def test_results_say_what_was_measured(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {"config.yaml", "metrics.csv", "adapter", "results.json", "curves.png", "wrong_predictions.png"}
    found = results(finished)
    assert found["test"]["top1"] > 0.6
    assert found["data"]["test_views"] == 2
    assert found["data"]["sampling"]["num_frames"] == 3
    assert found["method"][0]["class"] == "STAdapter"
    assert vp.read_metadata(finished / "adapter")["backbone"]["class"] == "VideoClassifier"


def test_the_table_counts_videos(tmp_path, videos, capsys):
    run_videos(tmp_path, videos, epochs=1)
    printed = capsys.readouterr().out
    assert "6 test videos" in printed or "3 test videos" in printed
    assert "views of each" in printed
    assert "2 of 3 frames" in printed
    assert "images" not in printed


def test_evaluate_repeats_the_test(finished, capsys):
    assert evaluate.main([str(finished)]) == 0
    again = json.loads((finished / "evaluation.json").read_text())
    assert again["test"] == results(finished)["test"]
    assert "test videos" in capsys.readouterr().out


def test_evaluate_with_other_views_and_frames(finished):
    crops = ["--data.test_crops", "3", "--data.shuffle_test_frames", "true"]
    assert evaluate.main([str(finished), *crops]) == 0
    data = json.loads((finished / "evaluation.json").read_text())["data"]
    assert (data["test_views"], data["shuffle_test_frames"]) == (6, True)
    # The method allows another number of frames, and one without the other is refused.
    frames = ["--data.sampling.num_frames", "2"]
    assert evaluate.main([str(finished), *frames, "--model.num_frames", "2"]) == 0
    assert json.loads((finished / "evaluation.json").read_text())["data"]["sampling"]["num_frames"] == 2


def test_predict(finished, videos, tmp_path, capsys):
    (row,) = predicted(finished, tmp_path / "one.json", videos / "red" / "0.mp4", "--top-k", "2")
    printed = capsys.readouterr().out
    assert "video" in printed
    assert len(row["classes"]) == 2
    rows = predicted(finished, tmp_path / "all.json", videos)
    assert len(rows) == 21
    assert sum(row["classes"][0] in row["path"] for row in rows) > 13
    assert all(sum(row["probabilities"]) == pytest.approx(1, abs=1e-4) for row in rows)
    same = next(other for other in rows if other["path"] == row["path"])
    assert row["probabilities"] == pytest.approx(same["probabilities"][:2], abs=1e-5)  # in a batch of another size


def test_predict_gives_what_the_test_gave(finished, videos, tmp_path):
    """The test split is scored by the views and the model that `predict` uses."""
    rows = predicted(finished, tmp_path / "all.json", videos)
    record = results(finished)
    right = {row["path"]: row["classes"][0] in row["path"] for row in rows}
    source = VideoFolder(videos).sources["test"]
    share = sum(right[str(path)] for path in source.paths) / len(source)
    assert share == pytest.approx(record["test"]["top1"])


def test_a_run_by_time(tmp_path, videos, capsys):
    """The run records how frames were chosen, and `predict` chooses them so; folders of frames have no times."""
    sampling = "{kind: dense, num_frames: 3, stride: 1, test_clips: 2, by: time, seconds: 0.3}"
    made = run_videos(tmp_path / "runs", videos, "--data.sampling", sampling, epochs=1)
    recorded = results(made)["data"]["sampling"]
    assert (recorded["by"], recorded["seconds"], recorded["stride"]) == ("time", 0.3, 1)
    rows = predicted(made, tmp_path / "all.json", videos)
    assert len(rows) == 21
    write_frames(tmp_path / "frames", 5)
    assert predict.main([str(made), str(tmp_path / "frames")]) == 2
    assert "nobody knows when one is shown; sample its frames by index" in capsys.readouterr().err


def test_damaged_videos(finished, videos, tmp_path, capsys):
    folder = draw_videos(tmp_path / "mixed", per_class=1)
    (folder / "broken.mp4").write_bytes(b"no video")
    assert predict.main([str(finished), str(folder)]) == 2
    error = capsys.readouterr().err
    assert "broken.mp4" in error
    assert error.count("\n") == 1
    assert len(predicted(finished, tmp_path / "out.json", folder, "--skip-corrupt")) == 3


@pytest.mark.parametrize("workers", ["0", "1"])
def test_damaged_training_video(tmp_path, capsys, workers):
    folder = draw_videos(tmp_path / "films", per_class=6)
    for path in folder.rglob("[0-4].mp4"):
        path.write_bytes(path.read_bytes()[:40])
    arguments = [*video_arguments(folder, "--data.num_workers", workers), "--output", str(tmp_path / "runs")]
    assert fit.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert ".mp4" in error
    assert error.count("\n") == 1


def test_image_run_refuses_a_video(image_run, videos, capsys):
    assert predict.main([str(image_run), str(videos / "red" / "0.mp4")]) == 2
    error = capsys.readouterr().err
    assert "0.mp4 is a video, but the run in" in error
    assert error.count("\n") == 1


def test_video_run_refuses_an_image(finished, images, capsys):
    assert predict.main([str(finished), str(images / "red" / "0.png")]) == 2
    error = capsys.readouterr().err
    assert "0.png is an image, but the run in" in error
    assert error.count("\n") == 1


def test_a_folder_of_frames_is_a_video(finished, images, tmp_path):
    (row,) = predicted(finished, tmp_path / "out.json", images / "red")
    assert row["path"].endswith("red")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "video_st_adapter.yaml", "--data", "ClipArt"], "VideoClassification takes videos, but ClipArt"),
        (["--config", "vtab_lora.yaml", "--data", "Motion"], "ImageClassification takes images, but Motion"),
        (["--config", "fewshot_coop.yaml", "--data", "Motion"], "PromptLearning takes images, but Motion holds videos"),
        (["--config", "video_st_adapter.yaml", "--data.sampling.num_frames", "2"], "the model takes 4 (--model.num_fr"),
        (["--config", "video_aim.yaml", "--model.num_frames", "8"], "AIM(num_frames=4) has no embedding of time for"),
        (["--config", "vtab_lora.yaml", "--model.method", "STAdapter"], "takes single images"),
        (["--config", "video_st_adapter.yaml", "--data.augmentation.flip", "true"], "flip changes labels of Motion"),
        (["--config", "video_st_adapter.yaml", "--data.sampling.num_framez", "4"], "did you mean num_frames"),
    ],
)
def test_wrong_command_line(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert fit.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_resumed_run_equals_uninterrupted(tmp_path, videos):
    """With dropout, dropped clips, random frames and random crops."""
    whole = run_videos(tmp_path / "whole", videos, *AIM, epochs=3)

    with failing_in_second_epoch():
        fit.main([*video_arguments(videos, *AIM, epochs=3), "--output", str(tmp_path / "parts")])
    (part,) = (tmp_path / "parts").iterdir()
    assert not (part / "results.json").exists()
    assert fit.main(["--resume", str(part)]) == 0
    assert history_of(part) == history_of(whole)
    assert results(part)["test"] == results(whole)["test"]


def test_frames_of_aim_are_interpolated_on_request(tmp_path, videos):
    made = run_videos(tmp_path, videos, *AIM, epochs=1)
    frames = ["--model.num_frames", "2", "--data.sampling.num_frames", "2"]
    assert evaluate.main([str(made), *frames]) == 2
    assert evaluate.main([str(made), *frames, "--model.interpolate", "true"]) == 0
    assert len(predicted(made, tmp_path / "out.json", videos / "red")) == 7
