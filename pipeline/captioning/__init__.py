"""Captions that models write: which clips to ask for, whom to ask, and what answers to believe.

settings    what can be set              prompts     what a model is asked, from a file
requests    clips to frames to questions answers     answers to texts, or why not
captioner   the protocol of all sources  endpoint    a server that speaks OpenAI's protocol
offline     a vLLM engine of our own     fleet       several of those, in processes or on Ray
store       what was answered, for ever  describe    the stage: ask, judge, ask again, keep
"""
