"""The pyarrow schemas of everything tabular in a dataset. Layout and meaning: see README.md beside this file."""

import pyarrow as pa

FORMAT_VERSION = 2
SPLITS = ("train", "val")
SCORES = ("motion", "still", "brightness", "contrast", "sharpness", "saturation", "dark", "letterbox")

# Reasons of sources that could not be read. "unreachable" may pass: such a source is planned again once it answers.
UNREAD = ("missing", "refused", "unreachable")

# One row a source at planning time; `group` is unique within a split and never changes.
PLAN = pa.schema(
    [
        ("source", pa.string()),  # 20 hex digits of the content identity
        ("uri", pa.string()),
        ("bytes", pa.int64()),  # null where its store does not give it
        ("split", pa.string()),
        ("group", pa.int32()),
        ("duplicate_of", pa.string()),  # the URI whose content this one repeats, else null
        ("extra", pa.string()),  # a manifest's other columns as JSON, else null
    ]
)

# One row a source, good or rejected, written by the task of its group. `index.read_sources` leaves out the rows of
# sources that could not be read and were planned again.
SOURCES = pa.schema(
    [
        *PLAN,
        ("status", pa.string()),  # "good" or "rejected"
        ("reason", pa.string()),  # a code of pipeline.source.REASONS where rejected, else null
        ("detail", pa.string()),  # one line for people; also what was odd about a good source
        ("codec", pa.string()),
        ("width", pa.int32()),  # as displayed: after rotation and sample aspect ratio
        ("height", pa.int32()),
        ("fps", pa.float64()),
        ("frames_expected", pa.int64()),  # by the container, 0 where it has no number
        ("frames_decoded", pa.int64()),
        ("frames_sampled", pa.int64()),  # at the clips' frame rate
        ("shots", pa.int32()),
        ("clips", pa.int32()),
        ("clips_dropped_short", pa.int32()),
        ("frames_dropped_short", pa.int64()),
        ("frames_dropped_black", pa.int64()),
        ("frames_dropped_transition", pa.int64()),  # inside a fade or dissolve
    ]
)

# One row a sample. The file's key-value metadata has the tar's size and sha256: it is the commit record.
INDEX = pa.schema(
    [
        ("key", pa.string()),  # SOURCE-CLIP, the clip in five digits
        ("source", pa.string()),
        ("clip", pa.int32()),  # neighbours in number are neighbours in time
        ("mp4_offset", pa.int64()),
        ("mp4_size", pa.int64()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
        # every read is checked by these, several times as fast as by sha256
        ("mp4_crc32", pa.uint32()),
        ("json_crc32", pa.uint32()),
        ("sha256", pa.string()),  # of the mp4 member
        ("first_frame", pa.int64()),  # number of the clip's first frame in the source
        ("start_seconds", pa.float64()),  # since the source's first frame
        ("frame_count", pa.int32()),
        ("fps", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("phash", pa.uint64()),  # perceptual hash of the middle frame
        ("label", pa.string()),  # the source's class in the manifest, else null
        *((score, pa.float32()) for score in SCORES),
    ]
)

# One row a sample of a cache column; joined to the base shard by key, checked by base_sha256.
COLUMN_INDEX = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("crc32", pa.uint32()),
        ("sha256", pa.string()),
        ("base_sha256", pa.string()),  # of the mp4 that this was made from
    ]
)

# One row a sample of a `latent-DIGEST` column: KEY.npy is (steps, 2, channels, height, width), mean and log-variance, so
# that a window is one range of bytes. A step is a latent: step 0 is of the first frame, step n of the `factor` frames up to
# n * factor; frames after the last step are not in it. A clip that was left out has 0 steps of 0 x 0.
LATENT_INDEX = pa.schema(
    [
        *COLUMN_INDEX,
        ("factor", pa.int32()),
        ("steps", pa.int32()),
        ("channels", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("step_crc32", pa.binary()),  # (steps,) little-endian uint32
        ("dtype", pa.string()),  # "float16", also where null; "bfloat16", whose bits KEY.npy has as uint16
    ]
)

# The same for a column whose clips may continue the stream of the clip before them. Step n of a stream is of its `factor`
# frames up to n * factor, and is stored with the clip that has this frame.
STREAM_INDEX = LATENT_INDEX.append(pa.field("stream_step", pa.int32()))  # steps of its stream before it

# One row a sample of a `tokens-DIGEST` column: KEY.npy is (windows, steps, height, width), code ids. Window n is of `frames`
# frames from n * hop on, every `stride`-th, encoded by itself, since a token depends on what is around it. A clip that was
# left out, or is shorter than a window, has 0 windows of 0 x 0.
TOKEN_INDEX = pa.schema(
    [
        *COLUMN_INDEX,
        ("frames", pa.int32()),
        ("stride", pa.int32()),
        ("hop", pa.int32()),  # frames from a window's first to the next one's
        ("windows", pa.int32()),
        ("steps", pa.int32()),  # of a window
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("window_crc32", pa.binary()),  # (windows,) little-endian uint32
        (
            "dtype",
            pa.string(),
        ),  # "uint16" or, for more codes, "uint32"; of sound "int16" or "int32", with -1 where a clip has none
    ]
)

# One caption of a clip.
CAPTION = pa.struct(
    [
        ("text", pa.string()),  # an empty text is a caption too
        ("start", pa.float64()),  # seconds in the clip; null: from its start
        ("end", pa.float64()),  # null: to its end
        ("language", pa.string()),
        ("source", pa.string()),  # who made it: "manifest", "shots", or a captioner's name
    ]
)

# One row a sample of a `caption-DIGEST` column, which is this table alone: it has no tar.
CAPTION_INDEX = pa.schema(
    [
        ("key", pa.string()),
        ("base_sha256", pa.string()),  # of the mp4 that these are the captions of
        ("captions", pa.list_(CAPTION)),  # null: there are none; never an empty list
        ("reason", pa.string()),  # why there are none, else null
        # digest of the captions that the source's annotations had; "asked:" before it where a captioner was
        ("annotations", pa.string()),
    ]
)

# One caption of a clip, and where the states of its tokens are: SHA.npy is (tokens, width) uint16, the bits of bfloat16.
TEXT = pa.struct(
    [
        ("sha", pa.string()),  # of the caption, see captions.py
        ("start", pa.float64()),  # seconds in the clip; null: from its start
        ("end", pa.float64()),  # null: to its end
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("crc32", pa.uint32()),
        ("tokens", pa.int32()),  # that have states, one at least
    ]
)

# One row a sample of a `text-DIGEST` column; several captions may have the same states.
TEXT_INDEX = pa.schema(
    [
        ("key", pa.string()),
        ("base_sha256", pa.string()),  # of the mp4 that these are the captions of
        (
            "texts",
            pa.list_(TEXT),
        ),  # in the order of the captions; null: there are none; empty: a view left the clip out
    ]
)

# One row a sample of a `score-NAME-DIGEST` column, a table without a tar; a column for each field of its scorer follows.
SCORE_INDEX = pa.schema(
    [
        ("key", pa.string()),
        ("base_sha256", pa.string()),  # of the mp4 that was scored
        ("reason", pa.string()),  # why there are no values, else null
    ]
)

# How the names of columns begin that are a table and no tar.
TABLES = ("caption-", "score-")

# One row a sample of the column `audio`: KEY.ogg has `samples` samples, those from the clip's first frame to the end of its
# last. A clip without sound has an empty member, and a reason.
AUDIO_INDEX = pa.schema(
    [
        *COLUMN_INDEX,
        ("codec", pa.string()),  # "opus" or "flac"
        ("rate", pa.int32()),  # samples a second
        ("channels", pa.int32()),
        ("samples", pa.int64()),  # in each channel
        ("has_audio", pa.bool_()),
        ("reason", pa.string()),  # a code of audio.REASONS where there is no sound, else null
        ("loudness", pa.float32()),  # root of the mean square in dB, 0 for a square wave of full scale; -120 at least
        ("silence", pa.float32()),  # share of 10 ms blocks below -60 dB
        ("clipping", pa.float32()),  # share of samples at full scale
    ]
)

# One row a clip of the dataset, used or not.
VIEW = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("keep", pa.bool_()),
        ("reason", pa.string()),  # the rule that dropped it, e.g. "motion < 0.004"; null where kept
        ("weight", pa.float32()),
    ]
)
