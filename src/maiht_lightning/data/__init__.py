"""Text in, token windows out: WikiText-2, C4 calibration, the offline text, local copies."""
