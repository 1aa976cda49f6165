"""Has a test changed what others use, and is what was closed gone?"""
