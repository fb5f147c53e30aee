"""The largest PSNR that two different images can have: what an infinite one counts as in differences.

Used where PSNRs of samples are subtracted: against the noise floor, and in the report. Imports nothing heavy.
"""

import math


def limit_psnr(psnr_db: float, size: tuple[int, int]) -> float:
    """A PSNR that differences can be formed with: identical images count as almost identical ones.

    The limit is the PSNR of two images that differ by one step in one color of one pixel, the least by which
    images of 8 bits can differ.

    Args:
        psnr_db: in dB; infinite for identical images.
        size: width and height in pixels.
    """
    width, height = size
    return min(psnr_db, 10 * math.log10(255**2 * 3 * width * height))
