"""The characters that are told apart."""

__all__ = ['CLASSES']

# Every image is scaled to its box, so one of two characters that differ in size or height alone is left out (c and C,
# p and P), and so are those that many fonts draw alike: across scripts (A, Alpha and the Cyrillic A; gamma and y),
# and within one (0 and O; 1, l and I).
_DIGITS = '0123456789'
_LATIN = 'ABCDEFGHJKLMNPQRSTUVWXYZ' + 'abdefghijmnqrty'
_GREEK = 'ΓΔΘΛΞΠΣΦΨΩ' + 'αβδεζηλμξπσω'
_CYRILLIC = 'БДЖИЙЦЧШЩЪЫЭЮЯ'
_SIGNS = '!?&@#$%+=*/<>()[]{}§€£'

CLASSES = tuple(_DIGITS + _LATIN + _GREEK + _CYRILLIC + _SIGNS)
