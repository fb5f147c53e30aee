"""The frames that stand for a video in files, in the report, and in metrics that need a network."""


def select_key_frames(num_frames: int) -> dict[str, int]:
    """The frames that stand for a video, by what they are called; of an image the only one."""
    if num_frames > 2:
        return {"first": 0, "middle": num_frames // 2, "last": num_frames - 1}
    return dict(zip(("first", "last"), range(num_frames), strict=False))
