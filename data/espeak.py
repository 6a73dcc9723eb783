"""Speech by espeak-ng, for the corpora that need no recordings. Library and voices are in the package espeakng-loader."""
import _ctypes
import ctypes

import espeakng_loader
import numpy as np

import audio
from common import UserError

AUDIO_OUTPUT_RETRIEVAL, CHARS_UTF8, RATE, PITCH = 1, 1, 1, 3  # from espeak-ng's speak_lib.h


def espeak_wav(text: str, sample_rate: int, wpm: int = 175, pitch: int = 50) -> np.ndarray:
    """Read `text` with espeak-ng's en-us voice. Returns (samples,) float32 in [-1, 1].

    `wpm` is the rate in words per minute, 80 to 450. `pitch` goes from 0 to 100. The defaults are espeak-ng's own.
    Raises AudioError if espeak-ng returns no samples, and UserError if it does not start.
    """
    lib = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = lib.espeak_Initialize(AUDIO_OUTPUT_RETRIEVAL, 0, str(espeakng_loader.get_data_path()).encode(), 0)
    if rate <= 0 or lib.espeak_SetVoiceByName(b"en-us") != 0:
        raise UserError(f"espeak-ng did not start (code {rate}) from {lib._name}; reinstall espeakng-loader")
    chunks = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(samples, count, _events):
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    lib.espeak_SetSynthCallback(collect)
    lib.espeak_SetParameter(RATE, wpm, 0)
    lib.espeak_SetParameter(PITCH, pitch, 0)
    data = text.encode()
    lib.espeak_Synth(data, len(data) + 1, 0, 0, 0, CHARS_UTF8, None, None)
    lib.espeak_Synchronize()
    # espeak-ng keeps state in static variables that nothing resets, so its output depends on the texts before. A corpus must
    # not depend on the number of workers or on interruptions. So unload the library after each utterance (5 ms).
    lib.espeak_Terminate()
    _ctypes.dlclose(lib._handle)
    if not chunks:
        raise audio.AudioError("zero length: espeak-ng returned no samples")
    return audio.resample(np.concatenate(chunks).astype(np.float32) / 32768, rate, sample_rate)
