"""PALU inside other people's projects."""
