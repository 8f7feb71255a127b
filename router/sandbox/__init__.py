"""Work on a client's text that may take long or end its process, in processes made for it.

A router has one zygote: a process that has imported vLLM and loaded the tokenizer, and forks a
child for each task. A child has a limit of CPU time and one of memory; when it crashes, a fork is
what is lost. Zygote and children run `router.sandbox.zygote`; the router's end is
`router.sandbox.process`.
"""
