# SPDX-License-Identifier: Apache-2.0
"""The two benchmarks: their files, columns, and subjects with Chinese names and groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_STEM, _SOCIAL, _HUMANITIES, _OTHER, _CHINA = "STEM", "Social Science", "Humanities", "Other", "China specific"


@dataclass(frozen=True)
class SubjectInfo:
    """The Chinese name goes into prompts, the groups into the table of results."""

    name: str
    groups: tuple[str, ...]


@dataclass(frozen=True)
class Benchmark:
    """Where the official files lie and what their columns are called.

    file: a path under the data directory with {split} and {subject}. system: of the Alpaca-2 prompt in the published
    script. id: the column of a question's number, which the rows are counted for when a file has none.
    """

    name: str
    title: str
    splits: tuple[str, ...]
    default_split: str
    file: str
    id: str
    question: str
    answer: str
    explanation: str | None
    system: str
    subjects: Mapping[str, SubjectInfo]

    def path(self, data: Path, split: str, subject: str) -> Path:
        """The CSV file of a subject."""
        return data / self.file.format(split=split, subject=subject)


_CEVAL = {
    "computer_network": SubjectInfo("计算机网络", (_STEM,)),
    "operating_system": SubjectInfo("操作系统", (_STEM,)),
    "computer_architecture": SubjectInfo("计算机组成", (_STEM,)),
    "college_programming": SubjectInfo("大学编程", (_STEM,)),
    "college_physics": SubjectInfo("大学物理", (_STEM,)),
    "college_chemistry": SubjectInfo("大学化学", (_STEM,)),
    "advanced_mathematics": SubjectInfo("高等数学", (_STEM,)),
    "probability_and_statistics": SubjectInfo("概率统计", (_STEM,)),
    "discrete_mathematics": SubjectInfo("离散数学", (_STEM,)),
    "electrical_engineer": SubjectInfo("注册电气工程师", (_STEM,)),
    "metrology_engineer": SubjectInfo("注册计量师", (_STEM,)),
    "high_school_mathematics": SubjectInfo("高中数学", (_STEM,)),
    "high_school_physics": SubjectInfo("高中物理", (_STEM,)),
    "high_school_chemistry": SubjectInfo("高中化学", (_STEM,)),
    "high_school_biology": SubjectInfo("高中生物", (_STEM,)),
    "middle_school_mathematics": SubjectInfo("初中数学", (_STEM,)),
    "middle_school_biology": SubjectInfo("初中生物", (_STEM,)),
    "middle_school_physics": SubjectInfo("初中物理", (_STEM,)),
    "middle_school_chemistry": SubjectInfo("初中化学", (_STEM,)),
    "veterinary_medicine": SubjectInfo("兽医学", (_STEM,)),
    "college_economics": SubjectInfo("大学经济学", (_SOCIAL,)),
    "business_administration": SubjectInfo("工商管理", (_SOCIAL,)),
    "marxism": SubjectInfo("马克思主义基本原理", (_SOCIAL,)),
    "mao_zedong_thought": SubjectInfo("毛泽东思想和中国特色社会主义理论体系概论", (_SOCIAL,)),
    "education_science": SubjectInfo("教育学", (_SOCIAL,)),
    "teacher_qualification": SubjectInfo("教师资格", (_SOCIAL,)),
    "high_school_politics": SubjectInfo("高中政治", (_SOCIAL,)),
    "high_school_geography": SubjectInfo("高中地理", (_SOCIAL,)),
    "middle_school_politics": SubjectInfo("初中政治", (_SOCIAL,)),
    "middle_school_geography": SubjectInfo("初中地理", (_SOCIAL,)),
    "modern_chinese_history": SubjectInfo("近代史纲要", (_HUMANITIES,)),
    "ideological_and_moral_cultivation": SubjectInfo("思想道德修养与法律基础", (_HUMANITIES,)),
    "logic": SubjectInfo("逻辑学", (_HUMANITIES,)),
    "law": SubjectInfo("法学", (_HUMANITIES,)),
    "chinese_language_and_literature": SubjectInfo("中国语言文学", (_HUMANITIES,)),
    "art_studies": SubjectInfo("艺术学", (_HUMANITIES,)),
    "professional_tour_guide": SubjectInfo("导游资格", (_HUMANITIES,)),
    "legal_professional": SubjectInfo("法律职业资格", (_HUMANITIES,)),
    "high_school_chinese": SubjectInfo("高中语文", (_HUMANITIES,)),
    "high_school_history": SubjectInfo("高中历史", (_HUMANITIES,)),
    "middle_school_history": SubjectInfo("初中历史", (_HUMANITIES,)),
    "civil_servant": SubjectInfo("公务员", (_OTHER,)),
    "sports_science": SubjectInfo("体育学", (_OTHER,)),
    "plant_protection": SubjectInfo("植物保护", (_OTHER,)),
    "basic_medicine": SubjectInfo("基础医学", (_OTHER,)),
    "clinical_medicine": SubjectInfo("临床医学", (_OTHER,)),
    "urban_and_rural_planner": SubjectInfo("注册城乡规划师", (_OTHER,)),
    "accountant": SubjectInfo("注册会计师", (_OTHER,)),
    "fire_engineer": SubjectInfo("注册消防工程师", (_OTHER,)),
    "environmental_impact_assessment_engineer": SubjectInfo("环境影响评价工程师", (_OTHER,)),
    "tax_accountant": SubjectInfo("税务师", (_OTHER,)),
    "physician": SubjectInfo("医师资格", (_OTHER,)),
}

_CMMLU = {
    "agronomy": SubjectInfo("农学", (_OTHER,)),
    "anatomy": SubjectInfo("解剖学", (_STEM,)),
    "ancient_chinese": SubjectInfo("古汉语", (_CHINA, _SOCIAL)),
    "arts": SubjectInfo("艺术学", (_HUMANITIES,)),
    "astronomy": SubjectInfo("天文学", (_STEM,)),
    "business_ethics": SubjectInfo("商业伦理", (_SOCIAL,)),
    "chinese_civil_service_exam": SubjectInfo("中国公务员考试", (_CHINA, _SOCIAL)),
    "chinese_driving_rule": SubjectInfo("中国驾驶规则", (_CHINA, _OTHER)),
    "chinese_food_culture": SubjectInfo("中国饮食文化", (_CHINA, _SOCIAL)),
    "chinese_foreign_policy": SubjectInfo("中国外交政策", (_CHINA, _SOCIAL)),
    "chinese_history": SubjectInfo("中国历史", (_CHINA, _HUMANITIES)),
    "chinese_literature": SubjectInfo("中国文学", (_CHINA, _HUMANITIES)),
    "chinese_teacher_qualification": SubjectInfo("中国教师资格", (_CHINA, _SOCIAL)),
    "clinical_knowledge": SubjectInfo("临床知识", (_OTHER,)),
    "college_actuarial_science": SubjectInfo("大学精算学", (_STEM,)),
    "college_education": SubjectInfo("大学教育学", (_SOCIAL,)),
    "college_engineering_hydrology": SubjectInfo("大学工程水文学", (_STEM,)),
    "college_law": SubjectInfo("大学法律", (_HUMANITIES,)),
    "college_mathematics": SubjectInfo("大学数学", (_STEM,)),
    "college_medical_statistics": SubjectInfo("大学医学统计", (_STEM,)),
    "college_medicine": SubjectInfo("大学医学", (_OTHER,)),
    "computer_science": SubjectInfo("计算机科学", (_STEM,)),
    "computer_security": SubjectInfo("计算机安全", (_OTHER,)),
    "conceptual_physics": SubjectInfo("概念物理学", (_STEM,)),
    "construction_project_management": SubjectInfo("建设工程管理", (_CHINA, _OTHER)),
    "economics": SubjectInfo("经济学", (_SOCIAL,)),
    "education": SubjectInfo("教育学", (_SOCIAL,)),
    "electrical_engineering": SubjectInfo("电气工程", (_STEM,)),
    "elementary_chinese": SubjectInfo("小学语文", (_CHINA, _SOCIAL)),
    "elementary_commonsense": SubjectInfo("小学常识", (_CHINA, _OTHER)),
    "elementary_information_and_technology": SubjectInfo("小学信息技术", (_OTHER,)),
    "elementary_mathematics": SubjectInfo("初等数学", (_STEM,)),
    "ethnology": SubjectInfo("民族学", (_CHINA, _SOCIAL)),
    "food_science": SubjectInfo("食品科学", (_OTHER,)),
    "genetics": SubjectInfo("遗传学", (_STEM,)),
    "global_facts": SubjectInfo("全球事实", (_HUMANITIES,)),
    "high_school_biology": SubjectInfo("高中生物", (_STEM,)),
    "high_school_chemistry": SubjectInfo("高中化学", (_STEM,)),
    "high_school_geography": SubjectInfo("高中地理", (_SOCIAL,)),
    "high_school_mathematics": SubjectInfo("高中数学", (_STEM,)),
    "high_school_physics": SubjectInfo("高中物理学", (_STEM,)),
    "high_school_politics": SubjectInfo("高中政治", (_CHINA, _SOCIAL)),
    "human_sexuality": SubjectInfo("人类性行为", (_OTHER,)),
    "international_law": SubjectInfo("国际法学", (_HUMANITIES,)),
    "journalism": SubjectInfo("新闻学", (_SOCIAL,)),
    "jurisprudence": SubjectInfo("法理学", (_HUMANITIES,)),
    "legal_and_moral_basis": SubjectInfo("法律与道德基础", (_OTHER,)),
    "logical": SubjectInfo("逻辑学", (_HUMANITIES,)),
    "machine_learning": SubjectInfo("机器学习", (_STEM,)),
    "management": SubjectInfo("管理学", (_SOCIAL,)),
    "marketing": SubjectInfo("市场营销", (_SOCIAL,)),
    "marxist_theory": SubjectInfo("马克思主义理论", (_HUMANITIES,)),
    "modern_chinese": SubjectInfo("现代汉语", (_CHINA, _SOCIAL)),
    "nutrition": SubjectInfo("营养学", (_OTHER,)),
    "philosophy": SubjectInfo("哲学", (_HUMANITIES,)),
    "professional_accounting": SubjectInfo("专业会计", (_SOCIAL,)),
    "professional_law": SubjectInfo("专业法学", (_HUMANITIES,)),
    "professional_medicine": SubjectInfo("专业医学", (_OTHER,)),
    "professional_psychology": SubjectInfo("专业心理学", (_SOCIAL,)),
    "public_relations": SubjectInfo("公共关系", (_SOCIAL,)),
    "security_study": SubjectInfo("安全研究", (_SOCIAL,)),
    "sociology": SubjectInfo("社会学", (_SOCIAL,)),
    "sports_science": SubjectInfo("体育学", (_OTHER,)),
    "traditional_chinese_medicine": SubjectInfo("中医中药", (_CHINA, _OTHER)),
    "virology": SubjectInfo("病毒学", (_STEM,)),
    "world_history": SubjectInfo("世界历史", (_HUMANITIES,)),
    "world_religions": SubjectInfo("世界宗教", (_HUMANITIES,)),
}

BENCHMARKS = {
    "ceval": Benchmark(
        name="ceval",
        title="C-Eval",
        splits=("val", "test", "dev"),
        default_split="val",
        file="{split}/{subject}_{split}.csv",
        id="id",
        question="question",
        answer="answer",
        explanation="explanation",
        system="You are a helpful assistant. 你是一个乐于助人的助手。",
        subjects=_CEVAL,
    ),
    "cmmlu": Benchmark(
        name="cmmlu",
        title="CMMLU",
        splits=("test", "dev"),
        default_split="test",
        file="{split}/{subject}.csv",
        id="",
        question="Question",
        answer="Answer",
        explanation=None,
        system="你是一个乐于助人的助手。",
        subjects=_CMMLU,
    ),
}
