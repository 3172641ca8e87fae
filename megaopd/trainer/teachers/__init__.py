"""Teachers that hand hidden states to the student: where they run and whose weights they have.

base.py says what a teacher is. wants.py: which rows of which sequences each student rank wants, cut
into jobs for the teacher's replicas; scoring.py runs jobs through a model; exchange.py moves the
rows between ranks of one job, ranks.py from ranks of the teacher's own; selves.py holds teachers
that are the student itself; routed.py several teachers; build.py makes what the configuration asks
for. trainer/teacher.py is the common case: one frozen model in the student's own groups.
"""
