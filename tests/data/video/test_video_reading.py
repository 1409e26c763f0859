"""Decoding: the right frames of many codecs and containers, and files that are not what they should be."""

import os

import av
import numpy as np
import pytest
from data_layouts import truncate
from PIL import Image
from video_files import number_of, picture, write_audio, write_frames, write_video

from visionpeft.data.video import decoding
from visionpeft.data.video import reading as video_reading
from visionpeft.data.video.reading import EncodedVideo, FrameFolder, list_videos, open_video
from visionpeft.errors import DataError

QUIET = {"x265-params": "log-level=none"}
FORMATS = {
    "h264.mp4": {"codec": "libx264"},
    "h264.mkv": {"codec": "libx264"},
    "h264.ts": {"codec": "libx264"},
    "h264.avi": {"codec": "libx264"},
    "h264.flv": {"codec": "libx264"},
    "intra.mp4": {"codec": "libx264", "keyframe_every": 1},
    "one_keyframe.mp4": {"codec": "libx264", "keyframe_every": 400},
    "open_gop.mp4": {"codec": "libx264", "options": {"x264-params": "open-gop=1:bframes=3:scenecut=0"}},
    "raw.h264": {"codec": "libx264"},
    "hevc.mp4": {"codec": "libx265", "options": QUIET},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg4_b.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "mpeg4_b.mp4": {"codec": "mpeg4", "options": {"bf": "2"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "rate": 24},
    "vp8.webm": {"codec": "libvpx"},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "motion_jpeg.avi": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "25_frames_a_second.mov": {"codec": "libx264", "rate": 25},
    "60_frames_a_second.mp4": {"codec": "libx264", "rate": 60},
    "with_sound.mp4": {"codec": "libx264", "audio": True},
}
TIMELESS = {"raw.h264", "h264.avi", "mpeg4_b.avi"}


def written(tmp_path, name):
    options = FORMATS[name]
    try:
        av.Codec(options["codec"], "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"PyAV was built without {options['codec']}")
    return write_video(tmp_path / name, 40, **options)


@pytest.mark.parametrize("name", FORMATS)
def test_frames_asked_for_are_the_frames_returned(tmp_path, name):
    video = EncodedVideo(written(tmp_path, name))
    assert len(video) == 40
    every = video.read(range(40), number_of)
    assert every == {index: index for index in range(40)}
    for wanted in ([0], [39], [11, 12, 13], [23, 24], [35, 3, 3, 20], [0, 39], [30]):
        assert video.read(wanted, number_of) == {index: index for index in wanted}
    video.check()


def test_index_is_not_made_again(tmp_path, monkeypatch):
    path = write_video(tmp_path / "video.mp4")
    index = open_video(path).index
    monkeypatch.setattr(video_reading, "index_of", None)
    assert open_video(path, index).read([7], number_of) == {7: 7}


def test_variable_frame_rate(tmp_path):
    times = np.cumsum(np.random.default_rng(0).integers(5, 400, 40)).tolist()
    for name in ("video.mp4", "video.mkv"):
        video = EncodedVideo(write_video(tmp_path / name, times=times))
        assert video.read([0, 17, 31, 39], number_of) == {0: 0, 17: 17, 31: 31, 39: 39}


def test_only_what_is_needed_is_decoded(tmp_path, monkeypatch):
    video = EncodedVideo(write_video(tmp_path / "video.mp4", 58, keyframe_every=6))
    decoded = []
    original = decoding.decoded_frames
    monkeypatch.setattr(
        decoding, "decoded_frames", lambda *given: (decoded.append(frame.pts) or frame for frame in original(*given))
    )
    assert video.read([50], number_of) == {50: 50}
    assert len(decoded) <= 6
    decoded.clear()
    video.read([3, 50], number_of)
    assert len(decoded) <= 12


# The matrices of phones held upright, upside down and turned the other way: rows of x' = a x + c y, y' = b x + d y.
@pytest.mark.parametrize(
    ("matrix", "corner"), [((0, 1, -1, 0), (0, -1)), ((-1, 0, 0, -1), (-1, -1)), ((0, -1, 1, 0), (-1, 0))]
)
def test_rotated_video_is_upright(tmp_path, matrix, corner):
    path = write_video(tmp_path / "video.mp4", 5)
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40  # version, flags, times, ids, ... of a track header of version 0
    for cell, value in zip((0, 1, 3, 4), matrix, strict=True):
        data[place + 4 * cell : place + 4 * cell + 4] = (value << 16).to_bytes(4, "big", signed=True)
    path.write_bytes(data)
    pixels = EncodedVideo(path).read([0], np.asarray)[0]
    assert pixels.shape[:2] == ((64, 48) if matrix[0] == 0 else (48, 64))
    corners = {(row, column): pixels[row, column].mean() for row in (0, -1) for column in (0, -1)}
    assert max(corners, key=corners.get) == corner


def write_corners(path, degrees=None, hflip=False, vflip=False):
    """Five equal frames of 64 x 48 whose corners tell them apart, with a display matrix that PyAV 18.1 writes."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, 32:], pixels[24:, :32], pixels[24:, 32:] = 80, 150, 250
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        if degrees is not None:
            if not hasattr(stream, "set_display_rotation"):
                pytest.skip("this PyAV writes no display matrix")
            stream.set_display_rotation(degrees, hflip=hflip, vflip=vflip)
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return pixels


def corners(pixels):
    return [[int(round(pixels[row, column].mean(), -1)) for column in (4, -4)] for row in (4, -4)]


@pytest.mark.parametrize("name", ["video.mp4", "video.mov"])
@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_all_eight_orientations_are_shown_as_a_player_shows_them(tmp_path, name, degrees, hflip):
    """Turned counter-clockwise, then mirrored: what PyAV documents for `set_display_rotation`, done by NumPy."""
    stored = write_corners(tmp_path / name, degrees, hflip)
    expected = np.rot90(stored, degrees // 90)
    expected = expected[:, ::-1] if hflip else expected
    shown = EncodedVideo(tmp_path / name).read([0, 4], np.asarray)
    for pixels in shown.values():
        assert pixels.shape == expected.shape
        assert corners(pixels) == corners(expected)


def test_a_mirrored_video_is_not_turned_upside_down(tmp_path):
    """As selfie recorders write it: PyAV 18.1 calls it a rotation by -180 degrees."""
    write_corners(tmp_path / "mirrored.mp4", 0, hflip=True)
    with av.open(str(tmp_path / "mirrored.mp4")) as container:
        assert abs(next(container.decode(video=0)).rotation) == 180
    assert corners(EncodedVideo(tmp_path / "mirrored.mp4").read([0], np.asarray)[0]) == [[80, 0], [250, 150]]
    write_corners(tmp_path / "plain.mp4")
    assert corners(EncodedVideo(tmp_path / "plain.mp4").read([0], np.asarray)[0]) == [[0, 80], [150, 250]]
    write_corners(tmp_path / "flipped.mp4", 0, vflip=True)
    assert corners(EncodedVideo(tmp_path / "flipped.mp4").read([0], np.asarray)[0]) == [[150, 250], [0, 80]]


IRREGULAR = np.cumsum(np.random.default_rng(0).integers(1, 10, 12) * 40).tolist()  # milliseconds: 1.9 seconds in all


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mpeg4.avi", {"codec": "mpeg4"}),
        ("mpeg4_b.avi", {"codec": "mpeg4", "options": {"bf": "2"}}),
        ("h264_b.avi", {"codec": "libx264"}),
        ("mjpeg.avi", {"codec": "mjpeg", "pixels": "yuvj420p"}),
    ],
)
def test_an_avi_of_variable_rate_is_whole(tmp_path, name, options):
    """Its header counts ticks of its rate, 1800 of them for 12 frames (PyAV 18.1, FFmpeg 8)."""
    path = write_video(tmp_path / name, 12, times=IRREGULAR, rate=25, **options)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames > 10 * 12
    video = EncodedVideo(path)
    video.check()
    assert video.read(range(12), number_of) == {index: index for index in range(12)}
    assert video.read([7], number_of) == {7: 7}
    # The negative control: with half of its frames it is refused.
    data = path.read_bytes()
    path.write_bytes(data[: (data.index(b"movi") + data.index(b"idx1")) // 2])
    with pytest.raises(DataError, match=r"cut off|damaged|no frames"):
        EncodedVideo(path).check()


TIMES = np.cumsum(np.random.default_rng(1).integers(40, 400, 30)).tolist()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("b_frames.mp4", {}),
        ("b_frames.mkv", {}),
        ("b_frames.flv", {}),
        ("b_frames.ts", {}),
        ("fragmented.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
        ("each_frame.mp4", {"container_options": {"movflags": "frag_every_frame+empty_moov"}}),
    ],
)
def test_at_a_time_the_frame_that_a_player_shows(tmp_path, name, options):
    """Variable rate with B-frames, whose average rate and guessed rate both mislead, and fragments.

    The frame at a time is the last whose time stamp is not later, by the times that were written.
    """
    path = write_video(tmp_path / name, 30, times=TIMES, **options)
    video = EncodedVideo(path)
    assert video.read(range(30), number_of) == {index: index for index in range(30)}
    written = (np.array(TIMES) - TIMES[0]) / 1000
    # Halfway between, so that a container's own rounding of times does not matter.
    halfway = (written[1:] + written[:-1]) / 2
    assert video.at(halfway.tolist()) == list(range(29))
    assert video.at([-1.0, 0.0, 1e6]) == [0, 0, 29]
    shown = video.read(video.at(halfway.tolist()), number_of)
    assert [shown[index] for index in video.at(halfway.tolist())] == list(range(29))
    # The negative control: at a constant rate, the average, other frames would be taken.
    assert [int(second * 29 / written[-1]) for second in halfway] != list(range(29))


def test_a_fragmented_file_begins_with_its_first_frame(tmp_path):
    """Its header counts 0 frames, and its first time stamp is 0.08 s (PyAV 18.1: H.264, two frames of delay at 25)."""
    options = {"movflags": "frag_keyframe+empty_moov"}
    path = write_video(tmp_path / "fragmented.mp4", 30, rate=25, container_options=options)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.frames == 0
        assert float(stream.start_time * stream.time_base) == pytest.approx(0.08)
    video = EncodedVideo(path)
    assert len(video) == 30
    assert video.at([0.0, 0.04, 0.08, 0.5, 1.16, 9.0]) == [0, 1, 2, 12, 29, 29]
    assert video.read([0, 29], number_of) == {0: 0, 29: 29}


FRAGMENTED = {"container_options": {"movflags": "frag_keyframe+empty_moov"}}


@pytest.mark.parametrize("name", [*sorted(FORMATS.keys() - TIMELESS), "fragmented.mp4"])
def test_length_of_a_video(tmp_path, name):
    """From the first frame to the end of the last one, not from the zero of the file's clock."""
    options = {"rate": 12} | FORMATS.get(name, FRAGMENTED)
    video = EncodedVideo(write_video(tmp_path / name, 30, **options))
    frame = 1 / options["rate"]
    assert video.length == pytest.approx(30 * frame, abs=0.002)  # Matroska counts in milliseconds
    assert video.at([video.length, 29.5 * frame, 28.5 * frame, 0.5 * frame]) == [29, 29, 28, 0]


@pytest.mark.parametrize("name", ["video.h264", "video.avi"])
def test_without_time_stamps_frames_have_numbers_only(tmp_path, name):
    """Raw H.264 has none at all; those of an AVI with B-frames are in the order of decoding."""
    video = EncodedVideo(write_video(tmp_path / name, 30))
    assert video.read([0, 13, 29], number_of) == {0: 0, 13: 13, 29: 29}
    with pytest.raises(DataError, match="no time stamps"):
        video.at([0.5])
    with pytest.raises(DataError, match="no time stamps"):
        _ = video.length


def test_an_edit_list_trims(tmp_path):
    """An MP4 trimmed without encoding again: 20 of its 30 frames are shown (a list is written for times below 0)."""
    source = write_video(tmp_path / "whole.mp4", 30, keyframe_every=30)
    options = {"avoid_negative_ts": "disabled"}
    with av.open(str(source)) as given, av.open(str(tmp_path / "trimmed.mp4"), "w", container_options=options) as made:
        stream = made.add_stream_from_template(given.streams.video[0])
        frame = round(1 / 12 / given.streams.video[0].time_base)
        for packet in given.demux(given.streams.video[0]):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - 10 * frame, packet.dts - 10 * frame, stream
                made.mux(packet)
    video = EncodedVideo(tmp_path / "trimmed.mp4")
    assert list(video.read(range(len(video)), number_of).values()) == list(range(10, 30))


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv", "cut.ts"])
def test_cut_inside_a_group_of_pictures_without_encoding_again(tmp_path, name):
    """Frames up to the first keyframe cannot be decoded; the first that can stands for them."""
    source = write_video(tmp_path / "whole.mp4", 60, keyframe_every=12)
    with av.open(str(source)) as given, av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        for number, packet in enumerate(given.demux(given.streams.video[0])):
            if number >= 19 and packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    video = open_video(tmp_path / name)
    shown = list(video.read(range(len(video)), number_of).values())
    assert len(shown) == 41
    assert shown == [max(number, 24) for number in range(19, 60)]
    assert video.read([30], number_of) == {30: 49}


def test_many_frames_are_not_kept(tmp_path):
    video = EncodedVideo(write_video(tmp_path / "long.mkv", 3000, options={"preset": "ultrafast"}))
    assert len(video) == 3000
    assert video.index.nbytes < 3000 * 16
    assert [video.read([i], number_of)[i] for i in (2900, 1501)] == [2900, 1501]


@pytest.mark.parametrize("name", ["video.mp4", "video.mkv", "video.avi", "video.webm"])
def test_truncated(tmp_path, name):
    codec = {"avi": "mpeg4", "webm": "libvpx"}.get(name.split(".")[1], "libx264")
    options = {"movflags": "faststart"} if name.endswith("mp4") else {}
    path = truncate(write_video(tmp_path / name, 120, codec=codec, keyframe_every=6, container_options=options))
    with pytest.raises(DataError, match=r"cut off|damaged") as caught:
        open_video(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_without_its_index(tmp_path):
    path = truncate(write_video(tmp_path / "video.mp4"))
    with pytest.raises(DataError, match=rf"video file {path} cannot be read \(its data are damaged\); repair"):
        open_video(path)


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_damaged_inside(tmp_path, codec):
    options = QUIET if codec == "libx265" else {}
    path = write_video(tmp_path / "video.mp4", 40, codec=codec, options=options, keyframe_every=10, grain=50)
    data = bytearray(path.read_bytes())
    place = len(data) // 3
    data[place : place + len(data) // 3] = np.random.default_rng(0).bytes(len(data) // 3)
    path.write_bytes(data)
    video = open_video(path)
    with pytest.raises(DataError, match=str(path)):
        video.check()
    with pytest.raises(DataError, match=str(path)):
        video.read(range(40), number_of)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"no video at all, just text\n" * 100, "cannot be read"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n", "cannot be read"),
        (b"ffconcat version 1.0\nfile other.mp4\n", "cannot be read"),
        (bytes(5000), "cannot be read"),
    ],
    ids=["empty", "text", "playlist", "list of files", "zeros"],
)
def test_not_a_video(tmp_path, content, message):
    path = tmp_path / "video.mp4"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path}.*{message}"):
        open_video(path)


def test_a_playlist_opens_no_other_file(tmp_path):
    write_video(tmp_path / "other.ts")
    lines = "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
    for name in ("list.m3u8", "list.mp4"):
        (tmp_path / name).write_text(lines)
        with pytest.raises(DataError, match="cannot be read"):
            open_video(tmp_path / name)


def test_sound_only_and_pictures_of_music(tmp_path):
    path = write_audio(tmp_path / "sound.mp4")
    with pytest.raises(DataError, match=f"video file {path} holds no video that can be decoded, only audio"):
        open_video(path)


def test_without_frames(tmp_path):
    path = tmp_path / "video.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    with pytest.raises(DataError, match=str(path)):
        open_video(path)


def test_missing_and_special_files(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        open_video(tmp_path / "video.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(DataError, match="does not exist"):
        open_video(tmp_path / "pipe.mp4")


def test_frames_too_large(tmp_path, monkeypatch):
    path = write_video(tmp_path / "video.mp4", 2)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="3072 pixels, above Pillow's limit"):
        open_video(path)


def test_odd_names(tmp_path):
    path = write_video(tmp_path / "concat:a b %03d é.mp4", 3)
    assert open_video(path).read([2], number_of) == {2: 2}


def test_folder_of_frames_in_the_order_of_numbers(tmp_path):
    video = open_video(write_frames(tmp_path / "video", 12))
    assert isinstance(video, FrameFolder)
    assert len(video) == 12
    assert video.read([11, 1, 9], number_of) == {1: 1, 9: 9, 11: 11}
    assert (video.read([3], np.asarray)[3] == picture(3)).all()
    video.check()
    truncate(tmp_path / "video" / "img_5.png")
    with pytest.raises(DataError, match=r"img_5\.png cannot be read"):
        video.check()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no frames"):
        open_video(tmp_path / "empty")


def test_list_videos(tmp_path):
    write_video(tmp_path / "b.mp4", 2)
    write_video(tmp_path / "deep/a.avi", 2, codec="mpeg4")
    write_video(tmp_path / ".hidden/a.mp4", 2)
    write_frames(tmp_path / "frames", 2)
    (tmp_path / "notes.txt").write_text("")
    Image.new("RGB", (4, 4)).save(tmp_path / "cover.png")
    found = [path.relative_to(tmp_path).as_posix() for path in list_videos(tmp_path)]
    assert found == [
        "b.mp4",
        "deep/a.avi",
        "frames",
    ]
