"""Sampling from the student, and the servers that do it.

contract    base, config, engines (which one a run takes), buffer (batches under way)
embedded    hf
servers     server (the fleet), member, watch, process, guard, command, serve (a node's own)
client      sglang (the engine), session, dispatch, jobs, records, http, loop
weights     sync, push, transfer, group, encode, target, fp8; verify and checksum
episodes    agent, episode, turns, steps
scoring     scoring, score_tables: log-probs of a teacher on servers
plug-in     sglang_cpu: SGLang on a machine without a GPU
"""
