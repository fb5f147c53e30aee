"""Powers of 2, the sizes of Hadamard matrices: Sylvester's exist for all, regular ones for powers of 4."""


def is_power_of_2(number: int) -> bool:
    """Whether a whole number is 1, 2, 4, 8 ..."""
    return number > 0 and number & (number - 1) == 0


def is_power_of_4(number: int) -> bool:
    """Whether a whole number is 1, 4, 16 ..., so that a regular Hadamard matrix of that size exists."""
    return is_power_of_2(number) and number.bit_length() % 2 == 1


def round_up_to_power_of_2(number: int) -> int:
    """The smallest power of 2 that is not below a number above 0."""
    return 1 << (number - 1).bit_length()
