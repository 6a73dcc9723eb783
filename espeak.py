"""espeak-ng's voice, from the espeakng-loader package: what speaks the corpora that need no recordings.

Nothing of the system's: the package carries the library and its data.
"""
import _ctypes
import ctypes

import numpy as np

import audio
from config import UserError


def voice():
    """The espeak-ng library that the espeakng-loader package carries, set up to hand its samples to us."""
    try:
        import espeakng_loader
    except ImportError:
        raise UserError("the embedded corpus needs the package espeakng-loader: pip install espeakng-loader") from None
    lib = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = lib.espeak_Initialize(1, 0, str(espeakng_loader.get_data_path()).encode(), 0)  # 1: AUDIO_OUTPUT_RETRIEVAL
    if rate <= 0 or lib.espeak_SetVoiceByName(b"en-us") != 0:
        raise UserError(f"espeak-ng did not start (code {rate}) from {espeakng_loader.get_library_path()}; "
                        "reinstall espeakng-loader")
    chunks = []

    def collect(samples, count, _events):
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0
    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)(collect)
    lib.espeak_SetSynthCallback(callback)
    return lib, rate, chunks, callback  # the callback must outlive the library's use of it


def speak(text: str, sample_rate: int, wpm: int = 175, pitch: int = 50) -> np.ndarray:
    """`text` in espeak-ng's en-us voice: (samples,) float32 in [-1, 1].

    `wpm` are words a minute (80 to 450), `pitch` goes from 0 to 100; espeak-ng's own are the defaults. Raises AudioError
    if nothing was said.
    """
    lib, rate, chunks, _ = voice()
    lib.espeak_SetParameter(1, wpm, 0)
    lib.espeak_SetParameter(3, pitch, 0)
    data = text.encode()
    lib.espeak_Synth(data, len(data) + 1, 0, 0, 0, 1, None, None)  # 1: espeakCHARS_UTF8
    lib.espeak_Synchronize()
    # espeak-ng keeps state in static variables that nothing resets, so that what it says depends on what it said before.
    # A corpus must not depend on the number of workers or on interruptions: unload the library after each utterance (5 ms).
    lib.espeak_Terminate()
    _ctypes.dlclose(lib._handle)
    if not chunks:
        raise audio.AudioError("zero length: espeak-ng said nothing")
    return audio.resample(np.concatenate(chunks).astype(np.float32) / 32768, rate, sample_rate)
