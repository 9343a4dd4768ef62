"""Diagnosis: the doctor, which finds where backprop fails and why, and the planner, which chooses the remedy."""

from dualnn.diagnosis.examination import doctor, examine
from dualnn.diagnosis.report import Finding, Report

__all__ = ["Finding", "Report", "doctor", "examine"]
